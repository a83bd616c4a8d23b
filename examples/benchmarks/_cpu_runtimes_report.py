"""What cpu_runtimes.py says: the machine, a table for every model and sparsity, the plot."""

import os
import platform
import sys
from pathlib import Path


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def free_memory() -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024.0


def hardware(threads: int) -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    told = ("avx2", "avx512f", "avx512_bf16", "avx512_vbmi2", "avx512_vnni", "amx_tile")
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": f"{cpu.get('model name', platform.processor())} (family {cpu.get('cpu family')}, model {cpu.get('model')})",
        "instructions": [flag for flag in told if flag in cpu.get("flags", "").split()],
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "huge_pages": pages.read_text().strip() if pages.exists() else None,
        "python": platform.python_version(),
    }


def print_table(name: str, sparsity: float, results: dict[str, dict]) -> None:
    print(f"\n{name}, {sparsity:.0%} zeros")
    print(f"  {'runtime':<26}{'ms/token':>9}{'tokens/s':>10}{'packed faster by':>22}{'peak GB':>9}{'equal tokens':>14}")
    for runtime, result in results.items():
        if "failed" in result:
            print(f"  {runtime:<26} failed: {result['failed'][:90]}")
            continue
        faster = result.get("packed_is_faster_by")
        ratio = f"{faster['median']:.2f} ({faster['lowest']:.2f}-{faster['highest']:.2f})" if faster else ""
        print(
            f"  {runtime:<26}{result['ms_per_token']:9.2f}{result['tokens_per_second']:10.1f}{ratio:>22}"
            f"{result['peak_bytes'] / 1e9:9.2f}{result['leading_equal_tokens']:14d}"
        )


def plot(report: dict, runtimes: list[str], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    libraries = list(dict.fromkeys(runtime.partition("-")[0] for runtime in runtimes))
    figure = Figure(figsize=(4.5 * len(report["models"]) + 2.5, 4.5), layout="constrained")
    panels = figure.subplots(1, len(report["models"]), squeeze=False)[0]
    for axes, (name, model) in zip(panels, report["models"].items(), strict=True):
        for runtime in runtimes:
            points = [
                (100 * float(sparsity), results[runtime]["tokens_per_second"])
                for sparsity, results in model["sparsities"].items()
                if "tokens_per_second" in results.get(runtime, {})
            ]
            if points:
                ours = runtime.startswith("packed")
                style = dict(
                    color=colormaps["tab10"](libraries.index(runtime.partition("-")[0])),
                    linestyle="-" if "bfloat16" in runtime else "--",
                    marker="s" if "compiled" in runtime else "o",
                    linewidth=2.5 if ours else 1.2,
                )
                axes.plot(*zip(*points, strict=True), label=runtime, **style)
        axes.set(title=name, xlabel="zeros in the linear layers, %", ylabel="tokens/s, batch 1", ylim=(0, None))
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"Decoding on {report['hardware']['threads']} cores, {report['date']}", fontsize=10)
    figure.savefig(path, dpi=150)
