"""Pictures of committed results, for ``report.py``: each takes matplotlib and the results of one benchmark, and returns a figure."""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks import memory, quality, scale, step, suite, trace

OURS, OTHERS, BELOW = "#c0392b", "#7f8c8d", "#d5d8dc"


def panels(plt: Any, count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and its axes, side by side, with one scale upwards."""
    figure, axes = plt.subplots(
        1, count, figsize=(width * count, height), sharey=True, layout="constrained", squeeze=False
    )
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def step_figure(plt: Any, results: dict[str, Any]) -> Any:
    """Time of a step relative to full fine-tuning, a panel for each model, with quartiles."""
    models = results["models"]
    figure, axes = panels(plt, len(models), 3.1, 3.6)
    ways = list(dict.fromkeys(way for model in models.values() for way in model["ways"]))
    for ax, (name, model) in zip(axes, models.items(), strict=True):
        for i, way in enumerate(ways):
            if way not in model["ways"]:
                ax.text(0.03, i, "not for these layers", va="center", fontsize=8, color=OTHERS)
                continue
            low, middle, high = suite.ratios(model["ways"][way]["step"], model["ways"][step.FULL]["step"])
            spread = [[middle - low], [high - middle]]
            ax.barh(i, middle, xerr=spread, color=_color(way), error_kw={"elinewidth": 1})
            ax.text(high + 0.03, i, f"{middle:.2f}", va="center", fontsize=8)
        ax.axvline(1.0, color="black", linewidth=0.6, linestyle=":")
        ax.set_title(name, fontsize=10)
        ax.set_xlim(
            0, 1.25 * max(suite.ratios(w["step"], model["ways"][step.FULL]["step"])[2] for w in model["ways"].values())
        )
    axes[0].set_yticks(range(len(ways)), ways)
    axes[0].invert_yaxis()
    figure.supxlabel("time of a training step, full fine-tuning = 1: medians and quartiles", fontsize=9)
    return figure


def _color(way: str) -> str:
    return OURS if way == step.JLORA else BELOW if way in (step.FLOOR, *step.FLOORS.values()) else OTHERS


def trace_figure(plt: Any, results: dict[str, Any]) -> Any:
    """Seconds to trace and lower against depth."""
    figure, axes = panels(plt, len(results["results"]), 4, 3.2)
    for ax, (model, by_depth) in zip(axes, results["results"].items(), strict=True):
        for kind, style in (("forward", "--"), ("gradient", "-")):
            for way, color in (("plain", OTHERS), ("jlora", OURS)):
                seconds = [trace.total(samples[f"{kind}, {way}"]) for samples in by_depth.values()]
                ax.plot(
                    [int(d) for d in by_depth],
                    seconds,
                    style,
                    color=color,
                    marker="o",
                    markersize=3,
                    label=f"{kind}, {way}",
                )
        ax.set(
            title={"flax": "unrolled layers", "jitted": "one jitted block"}.get(model, model),
            xlabel="layers",
            ylim=(0, None),
        )
    axes[0].set_ylabel("trace and lower, s")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def scale_figure(plt: Any, results: dict[str, Any]) -> Any:
    """Time of a gradient step relative to full fine-tuning along each axis, and the floor's."""
    axes_of = results["steps"]
    figure, axes = panels(plt, len(axes_of), 3.1, 3.2)
    for ax, (axis, by_value) in zip(axes, axes_of.items(), strict=True):
        values = [int(value) for value in by_value]
        for way, color in ((scale.JLORA, OURS), (scale.FLOOR, OTHERS)):
            found = [suite.ratios(x["ways"][way]["step"], x["ways"][scale.FULL]["step"]) for x in by_value.values()]
            low, middle, high = zip(*found, strict=True)
            ax.plot(values, middle, color=color, marker="o", markersize=3, label=way)
            ax.fill_between(values, low, high, color=color, alpha=0.2, linewidth=0)
        ax.axhline(1.0, color="black", linewidth=0.6, linestyle=":")
        ax.set_title(AXES.get(axis, axis))
        ax.set_xscale("log", base=2)
        ax.set_xticks(values, [str(value) for value in values])
        ax.minorticks_off()
    axes[0].set(
        ylabel="gradient step, full fine-tuning = 1\n(median, quartiles)", ylim=(0, None)
    )  # last: it ends the fit to what is drawn
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


AXES = {"depth": "layers", "length": "tokens", "kernels": "kernels adapted of each block"}


def memory_figure(plt: Any, results: dict[str, Any]) -> Any:
    """What each way needs, part by part, a panel for each size of model."""
    settings, colors = results["steps"], (OTHERS, OURS, "#e59866", BELOW)
    figure, axes = panels(plt, len(settings), 3.6, 2.9)
    for ax, (name, ways) in zip(axes, settings.items(), strict=True):
        left = [0.0] * len(ways)
        for part, color in zip(memory.PARTS, colors, strict=True):
            widths = [parts[part] / 2**30 for parts in ways.values()]
            ax.barh(list(ways), widths, left=left, color=color, label=part)
            left = [x + width for x, width in zip(left, widths, strict=True)]
        for y, x in enumerate(left):
            ax.text(x + 0.02 * max(left), y, f"{x:,.0f}" if x >= 10 else f"{x:.1f}", va="center", fontsize=8)
        ax.set(title=name, xlim=(0, 1.18 * max(left)))
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(labels), loc="outside upper center")
    figure.supxlabel(f"GiB of a training step, compiled for {results['target']}", fontsize=9)
    return figure


def quality_figure(plt: Any, results: dict[str, Any]) -> Any:
    """Accuracy over the rank, next to what trains everything and next to nothing; mean and standard deviation over the seeds."""
    figure, ax = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    ranks = results["ranks"]
    found = [accuracy(results, quality.adapter(rank)) for rank in ranks]
    middle, spread = zip(*found, strict=True)
    ax.errorbar(ranks, middle, yerr=spread, color=OURS, marker="o", markersize=4, capsize=3, label="LoRA")
    for method, style in ((quality.example.FINE_TUNED, "-"), (quality.example.PROBE, "--")):
        y, s = accuracy(results, method)
        ax.axhline(y, color=OTHERS, linestyle=style, label=method)
        ax.axhspan(y - s, y + s, color=OTHERS, alpha=0.2, linewidth=0)
    ax.set_xscale("log", base=2)
    share = [statistics.mean(quality.series(results, quality.adapter(rank), "trained")) for rank in ranks]
    whole = results["parameters"]["all"]
    ax.set_xticks(ranks, [f"{rank}\n{100 * n / whole:.2g} %" for rank, n in zip(ranks, share, strict=True)])
    ax.minorticks_off()
    ax.set(
        xlabel="rank, and share of the parameters that is trained",
        ylabel="accuracy on films never seen\n(mean, standard deviation)",
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    return figure


def accuracy(results: dict[str, Any], method: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    values = quality.series(results, method, "accuracy")
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


FIGURES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "step": step_figure,
    "trace": trace_figure,
    "scale": scale_figure,
    "memory": memory_figure,
    "quality": quality_figure,
}
"""By the name of the benchmark."""
