"""How many machine instructions routing takes for a token, counted in its sm_90 build on a machine without a GPU.

    python -m benchmarks.instructions

"quick" is the shortest path from the entry to the end, that of a token whose order is sure; "all" is the whole program,
the exact search included (a loop in it counts once). Needs triton, which brings the disassembler.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile

from kernels_pallas.catalogue import CATALOGUE
from kernels_pallas.targets import compile_kernel


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


def main() -> None:
    """Prints the counts."""
    print(f"{'sm_90':64}{'quick':>7}{'all':>7}")
    for entry in CATALOGUE:
        if entry.kernels == ("route",):
            (kernel,) = entry.lower("sm_90")
            code, labels = disassembled(compile_kernel(kernel, "sm_90").asm["cubin"])
            print(f"{entry.name:64}{shortest(code, labels):7}{len(code):7}", flush=True)


if __name__ == "__main__":
    main()
