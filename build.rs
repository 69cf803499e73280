//! Compiles the C++ of `src/torch_ext` and tells the linker where libtorch is.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=src/torch_ext/torch_ext.cpp");
    println!("cargo:rerun-if-changed=src/torch_ext/cpu_memory.cpp");
    println!("cargo:rerun-if-changed=src/torch_ext/torch_ext.h");
    let lib = PathBuf::from(
        env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where libtorch is: set LIBTORCH to its folder"),
    );
    let include = lib.parent().expect("libtorch's lib folder has a parent").join("include");

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .file("src/torch_ext/torch_ext.cpp")
        .file("src/torch_ext/cpu_memory.cpp");
    // libtorch's parallel_for lives in its headers and is serial unless compiled with OpenMP. It must be libtorch's own OpenMP
    // runtime: a second one would mean a second pool of threads on the same cores.
    let openmp = openmp_runtime(&lib).filter(|_| build.get_compiler().is_like_gnu());
    match &openmp {
        Some(_) => drop(build.flag("-fopenmp")),
        None => {
            println!("cargo:warning=no libgomp beside libtorch, or not a GNU compiler: CPU kernels run on one thread")
        }
    }
    build.compile("engraft_torch_ext");

    // The binary finds libtorch without LD_LIBRARY_PATH.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    // CUDA registers itself when its library is loaded; nothing refers to it by symbol, so the linker must be told to keep it.
    println!("cargo:rustc-link-arg=-Wl,--no-as-needed");
    println!("cargo:rustc-link-arg=-ltorch");
    if Path::new(&lib).join("libtorch_cuda.so").exists() {
        println!("cargo:rustc-link-arg=-ltorch_cuda");
    }
    if let Some(runtime) = openmp {
        println!("cargo:rustc-link-arg={}", runtime.display());
    }
}

/// libgomp as libtorch ships it: `libgomp.so.1`, or with a hash in its name.
fn openmp_runtime(lib: &Path) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = lib.read_dir().ok()?.flatten().map(|entry| entry.path()).collect();
    found.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("libgomp") && name.contains(".so")
    });
    found.sort();
    found.pop()
}
