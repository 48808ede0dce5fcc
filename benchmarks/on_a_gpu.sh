#!/usr/bin/env bash
# What a change to the kernels has to go through on a GPU, in parts that each end within ten minutes:
#
#     benchmarks/on_a_gpu.sh tests|sanitize|sanitize_hopper|bench|tiles|layers|endurance|counters [OUT]
#
# OUT (default: $OUT, or ./gpu_output) gets the logs and results. Where .peers/peers.tar.xz lies in the repository, as
# pack_peers.sh makes it, the peers' kernels are unpacked from there (and wheels beside it installed, such as pytest-xdist);
# else installed packages are taken, or none.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?tests, sanitize, sanitize_hopper, bench, tiles, layers, endurance or counters}
out=${2:-${OUT:-gpu_output}}
mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1

note="peers as installed"
if [ -f .peers/peers.tar.xz ] && [ ! -d /tmp/peers ]; then
    mkdir -p /tmp/peers && tar xJf .peers/peers.tar.xz -C /tmp/peers
    python3 -m pip install -q --no-index --no-deps --target /tmp/peers/site /tmp/peers/wheels/*.whl $(ls .peers/*.whl 2>/dev/null)
fi
if [ -d /tmp/peers ]; then
    export PYTHONPATH=/tmp/peers/flashinfer:/tmp/peers/site:/tmp/peers
    note="peers packed by pack_peers.sh"
fi
jobs=() # a test waits for the CPU that compiles its kernels, so several go at once where pytest-xdist is there
if python3 -c "import xdist" 2>/dev/null; then jobs=(-n 8 --dist worksteal -p no:benchmark); fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

case $part in
tests)
    timeout -s INT 560 python3 -m pytest -q -rf "${jobs[@]}" --maxfail=40 --durations=20 tests/gpu 2>&1 | tee "$out/tests.log" | tail -60
    ;;
sanitize | sanitize_hopper)
    for tool in memcheck racecheck; do
        log="$out/$tool${part#sanitize}.log"
        timeout 280 compute-sanitizer --tool $tool --error-exitcode 9 python3 -m "benchmarks.$part" >"$log" 2>&1
        echo "$tool: exit $?; $(tail -2 "$log" | tr '\n' ' ')"
    done
    ;;
bench)
    python3 -m jaxmoe bench --only load,movement,elsewhere,align,step,router_logits,host,route --output "$out/bench.json" --note "$note" 2>&1 |
        tee "$out/bench.log" | tail -110
    ;;
tiles)
    python3 -m benchmarks.logits_tiles 2>&1 | tee "$out/logits_tiles.log" | tail -90
    python3 -m benchmarks.matmul_tiles 2>&1 | tee "$out/matmul_tiles.log" | tail -90
    ;;
layers)
    python3 -m benchmarks.jax_layer --output "$out/jax_layer.json"
    python3 -m benchmarks.parts --output "$out/parts.json"
    python3 -m jaxmoe bench --only experts,layer,part,huggingface --output "$out/layers.json" --note "$note" 2>&1 | tee "$out/layers.log" | tail -40
    ;;
endurance)
    python3 -m benchmarks.endurance --output "$out/endurance.json"
    ;;
counters)
    python3 -m benchmarks.counters --output "$out/counters.md"
    ;;
*)
    echo "no such part: $part" >&2
    exit 2
    ;;
esac
