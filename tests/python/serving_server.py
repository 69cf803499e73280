"""A running server, asked by `engraft verify --server`: does it tell the adapter, the bare base and another adapter apart?

    python tests/python/serving_server.py --engraft target/release/engraft --probe EXPORT --base base.gguf --trained trained.gguf
        [--other other.gguf] [--lora adapter.gguf] [--other-lora other-adapter.gguf]

EXPORT is the folder of an export with probe.json. llama-cpp-python's server (`pip install 'llama-cpp-python[server]'`) is started
on each file in turn, with probabilities (`--logits_all true`) and without, and what `verify --server` says must be: of the trained
model (or of the base with the adapter) that it is served, code 0; of the base that it is the bare base, code 12; of the other one
that it is neither, code 12. A server that is gone must be said to be gone, code 11. Ends with 77 where llama-cpp-python is missing.
"""

import argparse
import contextlib
import importlib.util
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engraft", required=True)
    parser.add_argument("--probe", required=True, type=pathlib.Path, metavar="EXPORT")
    for name in ("base", "trained", "other", "lora", "other-lora"):
        parser.add_argument(f"--{name}", type=pathlib.Path, metavar="GGUF", required=name in ("base",))
    arguments = parser.parse_args()
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama-cpp-python is not installed: nothing is checked")
        sys.exit(77)
    cases = [("the bare base", arguments.base, None, "base", 12)]
    if arguments.trained:
        cases.append(("the trained model", arguments.trained, None, "trained", 0))
    if arguments.other:
        cases.append(("another model", arguments.other, None, "other", 12))
    if arguments.lora:
        cases.append(("the base with the adapter", arguments.base, arguments.lora, "trained", 0))
    if arguments.other_lora:
        cases.append(("the base with another adapter", arguments.base, arguments.other_lora, "other", 12))
    address = None
    for what, model, lora, verdict, code in cases:
        for probabilities in (True, False):
            with serving(model, lora, probabilities) as address:
                found, result, said = verify(arguments.engraft, arguments.probe, address)
            server = result.get("server", {})
            how = "with probabilities" if probabilities else "without"
            check(f"{what}, {how}: {server.get('verdict')}", (found, server.get("verdict")) == (code, verdict), said)
            if probabilities:
                check(f"{what}: probabilities were told", server.get("probabilities") is True, said)
                print(f"      strength {server.get('strength')}", flush=True)
    found, _, said = verify(arguments.engraft, arguments.probe, address)
    check("a server that is gone is said to be gone", found == 11 and "nobody answers" in said, said)
    if failures:
        sys.exit(f"{len(failures)} failed: " + "; ".join(failures))


if __name__ == "__main__":
    main()
