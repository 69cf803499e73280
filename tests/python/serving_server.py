"""Running servers, asked by `engraft verify --server`: does it tell the trained model, the bare base and another model apart?

    python tests/python/serving_server.py --engraft target/release/engraft --run runs/quickstart

The run is exported for llama.cpp: its adapter, and the whole model in each of TYPES; and so is its adapter at half its strength, which
is neither the trained model nor its base. llama-cpp-python's server (`pip install 'llama-cpp-python[server]'`) is started on each
file in turn, with probabilities (`--logits_all true`) and without, and what `verify --server` says must be: of the trained model (or
of the base with the adapter) that it is served, code 0; of the base that it is the bare base, code 12; of the other one that it is
neither (without probabilities, that or the bare base), code 12. A server that is gone must be said to be gone, code 11. `engraft verify` must say the same of the files.
"""

import argparse
import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

START = 180  # seconds that a server may take to load
failures = []


def check(what, good, said=""):
    """Prints and remembers one expectation."""
    print(f"{'ok  ' if good else 'FAIL'}  {what}", flush=True)
    if not good:
        failures.append(what)
        print(said, flush=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serving(model, lora=None, probabilities=True):
    """llama-cpp-python's server on a GGUF file, ready to answer; ended with the block."""
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_ctx", "2048", "--logits_all", str(probabilities).lower()]
    if lora:
        command += ["--lora_path", str(lora)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            address, began = f"http://127.0.0.1:{port}", time.monotonic()
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/v1/models", timeout=2).read()
                    break
                if server.poll() is not None or time.monotonic() - began > START:
                    log.seek(0)
                    sys.exit(f"the server did not start on {model}:\n{log.read().decode(errors='replace')[-3000:]}")
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()
            server.wait()


def verify(engraft, export, address):
    """Exit code, the result as JSON where there is one, and what was said."""
    run = subprocess.run(
        [engraft, "verify", export, "--server", address, "--timeout", "300", "--json"], capture_output=True, text=True
    )
    lines = run.stdout.strip().splitlines()
    return run.returncode, json.loads(lines[-1]) if lines else {}, run.stdout + run.stderr


TYPES = ["q8_0", "q4_k_m"]


def exported(engraft, source, out, *options):
    """An export for llama.cpp: its folder, and its one .gguf file. What is exported must be what was trained."""
    subprocess.run([engraft, "export", source, "--target", "llama.cpp", "--out", out, *options], check=True)
    found = subprocess.run([engraft, "verify", out], capture_output=True, text=True)
    check(f"the files of {out.name} are the trained model", found.returncode == 0, found.stdout + found.stderr)
    (file,) = out.glob("*.gguf")
    return out, file


def cases(engraft, run, folder):
    """What is served (a model, and an adapter on it), which export is asked of it, and what is to be said, with which code."""
    base = pathlib.Path(json.loads((run / "manifest.json").read_text())["base"]["files"][0]["path"])
    if base.suffix != ".gguf":
        subprocess.run([engraft, "export", base.parent, "--target", "llama.cpp", "--no-probe", "--out", folder / "base"], check=True)
        (base,) = (folder / "base").glob("*.gguf")
    half = folder / "half"
    adapter = run / "adapter"
    subprocess.run([engraft, "combine", adapter, adapter, "--weights", "0.25,0.25", "--by", "cat", "--out", half], check=True)
    named = ["--model", base]
    lora, lora_file = exported(engraft, run, folder / "lora")
    _, half_file = exported(engraft, half, folder / "half-lora", *named)
    for kind in TYPES:
        export, file = exported(engraft, run, folder / kind, "--merge", "--type", kind)
        yield f"the trained model in {kind}", file, None, export, "trained", 0
        yield f"the bare base, asked for {kind}", base, None, export, "base", 12
    yield "the base with the adapter", base, lora_file, lora, "trained", 0
    yield "the bare base", base, None, lora, "base", 12
    yield "the base with half the adapter", base, half_file, lora, "other", 12


def main():
    """Serves and asks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--engraft", required=True)
    parser.add_argument("--run", required=True, type=pathlib.Path, help="the folder of a run that is over")
    arguments = parser.parse_args()
    address = export = None
    with tempfile.TemporaryDirectory() as place:
        for what, model, lora, export, verdict, code in cases(arguments.engraft, arguments.run, pathlib.Path(place)):
            for probabilities in (True, False):
                with serving(model, lora, probabilities) as address:
                    found, result, said = verify(arguments.engraft, export, address)
                server = result.get("server", {})
                how = "with probabilities" if probabilities else "without"
                # By words alone half an adapter may pass for none; for the trained model it must not.
                allowed = {verdict, "base"} if verdict == "other" and not probabilities else {verdict}
                good = found == code and server.get("verdict") in allowed
                check(f"{what}, {how}: {server.get('verdict')}, strength {server.get('strength')}", good, said)
                if probabilities:
                    check(f"{what}: probabilities were told", server.get("probabilities") is True, said)
        found, _, said = verify(arguments.engraft, export, address)
        check("a server that is gone is said to be gone", found == 11 and "nobody answers" in said, said)
    if failures:
        sys.exit(f"{len(failures)} failed: " + "; ".join(failures))


if __name__ == "__main__":
    main()
