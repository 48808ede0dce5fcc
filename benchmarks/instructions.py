"""How many machine instructions routing takes for a token, counted in its sm_90 build on a machine without a GPU.

    python -m benchmarks.instructions

"quick" is the shortest path from the entry to the end, that of a token whose order is sure; "all" is the whole program,
the exact search included (a loop in it counts once). With "many tokens" it is that of a warp, which takes two of 512
experts, four of 256 and of 160, and eight of 8. Needs triton, which brings the disassembler.

Then, for random tokens, how many of them take which path: logits N(0, 1) in bfloat16; biases 0.1 N(0, 1), or all equal.
"""

from __future__ import annotations

import functools
import heapq
import re
import subprocess
import tempfile

import jax
import jax.numpy as jnp

import jaxmoe
from jaxmoe.config import rule_for
from kernels_pallas.catalogue import CATALOGUE
from kernels_pallas.launch import next_power_of_2
from kernels_pallas.quick import by_bits, layout_for, offsets, on_scale, quick_choice
from kernels_pallas.route import config_for
from kernels_pallas.targets import compile_kernel

MODELS = ("deepseek-v3", "kimi-k2", "kimi-k3", "glm-4.5", "deepseek-v2", "qwen3-next")
TOKENS = 40_000


def disassembled(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """(the instructions, which of them each label stands before)."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True)
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    return code, labels


def shortest(code: list[str], labels: dict[str, int]) -> int:
    """The fewest instructions from the first to one that ends the program."""
    best, queue = {0: 1}, [(1, 0)]
    while queue:
        length, at = heapq.heappop(queue)
        text = code[at]
        always = not text.startswith("@")
        if always and re.search(r"\bEXIT\b", text):
            return length
        branch = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", text)
        following = [labels[branch[1]]] if branch else []
        if not branch or not always or "U" in text.split()[0]:
            following.append(at + 1)
        for after in following:
            if after < len(code) and length + 1 < best.get(after, len(code) + 1):
                best[after] = length + 1
                heapq.heappush(queue, (length + 1, after))
    raise RuntimeError("no instruction that ends the program was reached")


def shares(model: str, scale: float) -> tuple[float, float, float]:
    """Of random tokens: those that are sure; those whose picks are sure, but not their order; those done again."""
    config = jaxmoe.presets[model]
    has_bias = config.scoring_func == "sigmoid"
    rule = rule_for(config, has_bias)
    bias = jax.random.normal(jax.random.key(1), (rule.num_experts,)) * scale

    def read(values: jax.Array, expert: jax.Array, mask: jax.Array | None) -> jax.Array:
        found = values[jnp.clip(expert, 0, rule.num_experts - 1)].astype(jnp.float32)
        return found if mask is None else jnp.where(mask, found, 0.0)

    spare = by_bits(rule, has_bias, 2)
    layout, possible = layout_for(rule, config_for(1, rule.num_experts, rule.num_slots, "cuda").lanes, spare)
    assert possible, f"no quick search for {model}"
    columns = lambda values, itemsize: [c[0] for c in layout.load(lambda row, *at: read(values, *at), itemsize, 1)]
    biases = columns(bias, 4) if has_bias else None
    if biases and on_scale(rule, has_bias):
        biases = offsets(biases, bias[0], assembly=False)
    slots = next_power_of_2(rule.num_slots)
    choose = functools.partial(
        quick_choice, rule=rule, layout=layout, possible=possible, spare=spare, slots=slots, assembly=True
    )  # with CUDA's margin; the instruction itself is in `offsets`

    def search(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = choose(columns(logits, 2), biases, bias[0] if has_bias else None)
        assert found.sure is not None
        return found.sure, found.sure if found.members_sure is None else found.members_sure

    # Drawn in float32: in bfloat16 jax draws from few values, and most would be equal.
    logits = jax.random.normal(jax.random.key(0), (TOKENS, rule.num_experts)).astype(jnp.bfloat16)
    sure, members = jax.jit(lambda logits: jax.lax.map(search, logits, batch_size=400))(logits)
    return float(sure.mean()), float((members & ~sure).mean()), float((~members).mean())


def main() -> None:
    """Prints the counts, then the shares."""
    print(f"{'sm_90':64}{'quick':>7}{'all':>7}")
    for entry in CATALOGUE:
        if entry.kernels == ("route",):
            (kernel,) = entry.lower("sm_90")
            code, labels = disassembled(compile_kernel(kernel, "sm_90").asm["cubin"])
            print(f"{entry.name:64}{shortest(code, labels):7}{len(code):7}", flush=True)
    print(f"{'percent of random tokens':64}{'quick':>8}{'order':>8}{'exact':>8}")
    for model in MODELS:
        for scale in (0.1, 0.0) if jaxmoe.presets[model].scoring_func == "sigmoid" else (0.0,):
            line = "".join(f"{100 * share:8.2f}" for share in shares(model, scale))
            print(f"{model + (', biases' if scale else ', none or equal ones'):64}{line}", flush=True)


if __name__ == "__main__":
    main()
