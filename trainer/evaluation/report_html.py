"""One HTML file about one token, for the person who must decide whether to deploy it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path

from be_serve.core.artifact import Manifest, write_atomically
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.verdict import Verdict

_ARMS = {
    "none": "no prompt",
    "template_default": "the template's default",
    "summary": "summary",
    "full": "full prompt",
    "be": "[BE]",
    "be_serving": "[BE], serving dtype",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .3rem .7rem; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #999 } tr + tr td { border-top: 1px solid #ddd } td.n { text-align: right }
.deployable { background: #dff0d8 } .lossy { background: #fcf3d0 } .failed { background: #f8d7da }
.verdict { padding: 1rem; border-radius: .4rem } .bar { background: #4a7; height: .7rem }
.frame { background: #eee; width: 8rem }
td.answer { width: 25%; font-size: 13px } img { max-width: 100% } h2 { margin-top: 2rem }
"""


def write_report(
    path: Path, manifest: Manifest, evaluation: Evaluation, verdict: Verdict, curves: Path | None = None
) -> None:
    """Write the report; nothing in it is loaded from elsewhere."""
    parts = [
        f"<h1>{escape(manifest.id)}: {manifest.k} vectors for {manifest.prompt.tokens} prompt tokens</h1>",
        f"<p>{escape(manifest.base_model.name)}, {evaluation.n_queries} queries never trained on, "
        f"{evaluation.n_tokens} tokens of the full prompt's own greedy answers.</p>",
        _verdict(verdict),
        "<h2>How near is it to the full prompt?</h2>",
        f"<p>rho = KL([BE]) / KL(no prompt) = <b>{evaluation.rho:.3f}</b> (95 % interval over the queries "
        f"{evaluation.rho_interval[0]:.3f} to {evaluation.rho_interval[1]:.3f}; 0 is the full prompt, 1 is nothing "
        "learned). Gain retained, in log-likelihood of the full prompt's answers: "
        f"<b>{evaluation.gain_retained:.2f}</b>.{_rho_default(evaluation)}</p>",
        _arms(evaluation),
    ]
    if evaluation.answers.answers:
        parts += ["<h2>Answers to their end</h2>", _whole_answers(evaluation)]
    if evaluation.clauses:
        parts += ["<h2>What it keeps of each sentence</h2>", _clauses(evaluation)]
    if evaluation.compliance:
        lines = "".join(f"<li>{escape(line)}</li>" for line in evaluation.compliance.lines())
        parts += ["<h2>Habits that a program can check</h2>", f"<ul>{lines}</ul>"]
    if evaluation.turns or evaluation.off_topic:
        parts += ["<h2>Over a conversation, and off topic</h2>", _robustness(evaluation)]
    if evaluation.samples:
        parts += ["<h2>What its answers do badly</h2>", _signatures(evaluation)]
        parts += ["<h2>Answers side by side</h2>", _samples(evaluation)]
    if evaluation.judged:
        parts += ["<h2>What a judge model says</h2>", _judged(evaluation)]
    if curves is not None and curves.exists():
        data = base64.b64encode(curves.read_bytes()).decode()
        parts += ["<h2>Training</h2>", f'<img alt="loss over the steps" src="data:image/png;base64,{data}">']
    parts += [
        "<h2>How it was made</h2>",
        _table(["setting", "value"], [[k, str(v)] for k, v in manifest.recipe.items()]),
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(manifest.id)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    write_atomically(path, page.encode())


def _verdict(verdict: Verdict) -> str:
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in verdict.named())
    return f'<div class="verdict {verdict.status}"><b>{verdict.status}</b><ul>{reasons}</ul></div>'


def _rho_default(evaluation: Evaluation) -> str:
    rho = evaluation.rho_default
    return "" if rho is None else f" KL([BE]) / KL(the template's default) = <b>{rho:.3f}</b>."


def _whole_answers(evaluation: Evaluation) -> str:
    head, *lines = evaluation.answers.lines()
    return f"<p>{escape(head)}</p><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _arms(evaluation: Evaluation) -> str:
    none = evaluation.arms["none"]["kl"] or math.nan
    rows = [
        [
            _ARMS[name],
            *(f"{value:.3f}" for value in (arm["kl"], arm["kl"] / none, arm["top1"], arm["first_token_kl"])),
        ]
        for name, arm in evaluation.arms.items()
    ]
    return _table(["in the prompt's place", "KL, nats a token", "rho", "top-1 agreement", "first-token KL"], rows)


def _clauses(evaluation: Evaluation) -> str:
    rows = []
    for clause in sorted(evaluation.clauses, key=lambda c: -c.kl):
        kept = clause.retained
        share = 0.0 if kept is None else min(max(kept, 0.0), 1.0)
        bar = (
            "bears on too few tokens to say"
            if kept is None
            else f'<div class="frame"><div class="bar" style="width:{100 * share:.0f}%"></div></div>{share:.0%}'
        )
        trained = escape(str(evaluation.training_queries.get(clause.text, "")))
        rows.append(
            f'<tr><td>{escape(clause.text)}</td><td class="n">{clause.kl:.3f}</td><td>{bar}</td>'
            f'<td class="n">{trained}</td></tr>'
        )
    head = (
        "<tr><th>sentence</th><th>KL when it is left out</th><th>of its effect the token keeps</th>"
        "<th>training queries on which it bears</th></tr>"
    )
    return f"<table>{head}{''.join(rows)}</table>"


def _robustness(evaluation: Evaluation) -> str:
    lines = [(f"turn {turn['turn']}", turn) for turn in evaluation.turns]
    if evaluation.off_topic:
        lines.append(("off topic", evaluation.off_topic))
    rows = [[name, *(f"{figures[key]:.3f}" for key in ("none", "be", "rho"))] for name, figures in lines]
    return _table(["", "KL, no prompt", "KL, [BE]", "rho"], rows)


def _judged(evaluation: Evaluation) -> str:
    rows = [
        [f"against {rival}", *(str(n) for n in (tally.wins, tally.ties, tally.losses, tally.unreadable))]
        for rival, tally in evaluation.judged.items()
    ]
    return _table(["the token's answers", "better", "equal", "worse", "unreadable"], rows)


def _signatures(evaluation: Evaluation) -> str:
    arms = [name for name in ("full", "none", "be") if name in evaluation.signatures]
    rows = [
        [name.replace("_", " "), *(f"{evaluation.signatures[arm][name]:.0%}" for arm in arms)]
        for name in evaluation.signatures["be"]
    ]
    rows.append(
        ["length of the answers, [BE] / full prompt", f"{evaluation.length_ratio:.2f}", "", ""][: len(arms) + 1]
    )
    return _table(["share of the answers", *(_ARMS[arm] for arm in arms)], rows)


def _samples(evaluation: Evaluation) -> str:
    names = list(evaluation.samples[0])
    titles: Mapping[str, str] = {"query": "question", **_ARMS}
    head = "".join(f"<th>{escape(titles[name])}</th>" for name in names)
    rows = [
        "<tr>" + "".join(f'<td class="answer">{escape(sample[name])}</td>' for name in names) + "</tr>"
        for sample in evaluation.samples
    ]
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
