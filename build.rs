//! Compiles `src/torch_ext/torch_ext.cpp` and tells the linker where libtorch is.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=src/torch_ext/torch_ext.cpp");
    println!("cargo:rerun-if-changed=src/torch_ext/torch_ext.h");
    let lib = PathBuf::from(
        env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where libtorch is: set LIBTORCH to its folder"),
    );
    let include = lib.parent().expect("libtorch's lib folder has a parent").join("include");

    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .file("src/torch_ext/torch_ext.cpp")
        .compile("engraft_torch_ext");

    // The binary finds libtorch without LD_LIBRARY_PATH.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    // CUDA registers itself when its library is loaded; nothing refers to it by symbol, so the linker must be told to keep it.
    println!("cargo:rustc-link-arg=-Wl,--no-as-needed");
    println!("cargo:rustc-link-arg=-ltorch");
    if Path::new(&lib).join("libtorch_cuda.so").exists() {
        println!("cargo:rustc-link-arg=-ltorch_cuda");
    }
}
