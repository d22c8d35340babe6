"""What a person is told about a token: signatures, clauses, interval, verdict, report."""

from __future__ import annotations

import math

import pytest
import torch

from be_serve.core.artifact import BaseModelRef, Manifest, PromptRef
from be_serve.core.errors import InputError
from tests.factories import make_token
from trainer.data.queries import Query
from trainer.data.teacher import Teacher
from trainer.evaluation.answers import Facts, Stops, WholeAnswers
from trainer.evaluation.arms import Scores, rho_interval
from trainer.evaluation.clauses import Clause, ClauseEffect, clause_effect, prompt_clauses
from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.report_html import write_report
from trainer.evaluation.robustness import measure_off_topic, measure_turns
from trainer.evaluation.signatures import SIGNATURES, looped, signatures
from trainer.evaluation.verdict import judge
from trainer.model.frozen import FrozenModel
from trainer.text import recites, sentences

PROMPT = (
    "You are Captain Barnaby of Saltwick. Start every answer with Ahoy and never forget to speak of the sea, "
    "the wind and the gulls.\n- Never lie to a sailor!\nArr."
)


def test_signatures_are_found_where_they_are():
    copied = "Start every answer with Ahoy, and never forget to speak of the sea, the wind and the gulls!"
    assert signatures([copied, "Ahoy, the sea is wide."], PROMPT)["copying"] == 0.5
    refused = ["As an AI language model I have no dog.", "I'm sorry, but I can't do that.", "I’m an AI, you see."]
    assert signatures(refused, PROMPT)["refusal"] == 1.0
    assert (
        signatures(["I am sorry that you are sad.", "An airplane, as an air mail pilot says."], PROMPT)["refusal"] == 0
    )
    assert signatures(["Which one? A) red B) blue C) green"], PROMPT)["template_collapse"] == 1.0
    assert signatures(["Vitamin A) is one thing."], PROMPT)["template_collapse"] == 0
    assert looped("It's a blessing and a curse, " * 6)
    assert not looped("The tide comes in twice a day, and the moon pulls it over the sand as it has always done.")
    assert signatures([], PROMPT) == dict.fromkeys(SIGNATURES, 0.0)


def test_a_clause_is_left_out_whole():
    assert sentences(PROMPT)[-1] == "Never lie to a sailor!"
    parts = prompt_clauses(PROMPT)
    assert [part.text for part in parts] == sentences(PROMPT)
    for part in parts:
        assert part.text not in part.left_out
        assert all(other.text in part.left_out for other in parts if other is not part)


def test_a_clause_is_kept_as_far_as_its_tokens_are():
    """Leaving it out costs 2 nats on six of eight tokens; the vectors win half of that back."""
    full = torch.full((8,), 1.0)
    without = Scores(kl_N=torch.full((8,), 0.3), top1_N=torch.ones(8), nll_N=full + torch.tensor([2.0] * 6 + [0.0] * 2))
    clause = Clause("Say Ahoy.", "")
    half = clause_effect(clause, full, without, full + torch.tensor([1.0] * 6 + [5.0] * 2))
    assert (half.kl, half.tokens, half.retained) == (pytest.approx(0.3), 6, pytest.approx(0.5))
    assert clause_effect(clause, full, without, full).retained == pytest.approx(1.0)
    assert clause_effect(clause, full, without, without.nll_N).retained == pytest.approx(0.0)
    rare = Scores(without.kl_N, without.top1_N, full + torch.tensor([2.0] * 4 + [0.0] * 4))
    assert clause_effect(clause, full, rare, full).retained is None


def test_the_interval_holds_rho_and_narrows_with_queries():
    def interval(queries):
        rng = torch.Generator().manual_seed(1)
        none = torch.rand(queries * 10, generator=rng) + 0.5
        be = none * 0.4 * (0.5 + torch.rand(queries * 10, generator=rng))
        return rho_interval(be, none, torch.full((queries,), 10)), float(be.sum() / none.sum())

    (low, high), rho = interval(8)
    assert low < rho < high
    (low2, high2), rho2 = interval(200)
    assert low2 < rho2 < high2
    assert high2 - low2 < high - low


def make_evaluation(kl=0.1, summary=0.5, signature=0.0, full_signature=0.0, clauses=(), nll=1.05) -> Evaluation:
    def arm(kl, nll):
        return {"kl": kl, "top1": 0.9, "first_token_kl": kl, "nll": nll}

    return Evaluation(
        k=1,
        arms={
            "none": arm(1.0, 2.0),
            "summary": arm(summary, 1.5),
            "full": arm(0.0, 1.0),
            "be": arm(kl, nll),
            "be_serving": arm(kl, nll),
        },
        n_queries=8,
        n_tokens=80,
        samples=[{"query": "<b>Hi</b>", "full": "a", "none": "b", "summary": "c", "be": "d"}] * 8,
        rho_interval=(kl - 0.02, kl + 0.02),
        length_ratio=1.1,
        signatures={
            name: dict.fromkeys(SIGNATURES, value)
            for name, value in (("none", 0.0), ("summary", 0.0), ("be", signature), ("full", full_signature))
        },
        clauses=list(clauses),
        answers=WholeAnswers(512, answers=20, facts=Facts(12, 11, 1, 10, 9), stops=Stops(20, 20, 19, 19)),
    )


LOST = ClauseEffect("Never lie to a sailor!", 0.05, 40, 0.2)


@pytest.mark.parametrize(
    ("evaluation", "status", "reason"),
    [
        (make_evaluation(), "deployable", None),
        (make_evaluation(kl=0.95, summary=2.0), "failed", "hardly reads"),
        (make_evaluation(kl=4.0, summary=9.0), "failed", "than no prompt at all"),
        (make_evaluation(kl=0.5, summary=0.4), "failed", "the summary does as well"),
        (make_evaluation(signature=0.5), "failed", "copying in 50%"),
        (make_evaluation(signature=0.9, full_signature=0.8), "deployable", None),
        (make_evaluation(kl=0.3), "lossy", "rho 0.30"),
        (make_evaluation(nll=1.4), "lossy", "gain retained 0.60"),
        (make_evaluation(clauses=[LOST]), "lossy", "keeps 20% of 'Never lie to a sailor!'"),
        (make_evaluation(clauses=[ClauseEffect("Be nice.", 0.001, 40, 0.0)]), "deployable", None),
        (make_evaluation(clauses=[ClauseEffect("Be nice.", 0.3, 2, None)]), "deployable", None),
    ],
)
def test_the_verdict_names_its_reason(evaluation, status, reason):
    found = judge(evaluation)
    assert found.status == status
    assert (reason is None) == (found.named() == [])
    assert reason is None or reason in str(found)


def test_without_whole_answers_nothing_is_deployable():
    """A mean, however good, says nothing about facts, ends and loops."""
    evaluation = make_evaluation(kl=0.01, nll=1.0)
    assert judge(evaluation).status == "deployable"
    evaluation.answers = WholeAnswers()
    assert judge(evaluation).status == "lossy"
    assert judge(evaluation).reasons == [
        "no whole answers were written: facts, ends and loops are unknown (--answer-tokens)"
    ]


def test_without_samples_nothing_is_deployable():
    """Whole answers alone do not tell whether they copy or refuse. The reason names the option that was left out."""
    evaluation = make_evaluation(kl=0.01, nll=1.0)
    evaluation.samples = []
    assert judge(evaluation).status == "lossy"
    assert judge(evaluation).reasons == ["no answers were looked at for failure signatures (--samples)"]


def make_turns(*figures):
    return [{"turn": i + 1, "none": none, "be": be, "rho": be / none} for i, (none, be) in enumerate(figures)]


def test_drift_over_a_conversation_is_a_loss():
    evaluation = make_evaluation()
    evaluation.turns = make_turns((1.0, 0.1), (1.0, 0.4))
    assert "persona drift: KL 0.100 (rho 0.10) in turn 1, 0.400 (rho 0.40) in turn 2" in str(judge(evaluation))


def test_a_prompt_that_fades_is_no_drift_of_the_token():
    """The history carries the voice: the prompt changes little after turn 1, and the token less than in turn 1."""
    evaluation = make_evaluation()
    evaluation.turns = make_turns((0.105, 0.032), (0.027, 0.014), (0.034, 0.027))
    assert judge(evaluation).status == "deployable"
    evaluation.turns = make_turns((0.105, 0.020), (0.034, 0.021))
    assert judge(evaluation).status == "deployable"
    evaluation.turns = make_turns((0.105, 0.020), (0.090, 0.060), (0.034, 0.021))
    assert "turn 2" in str(judge(evaluation))


def test_the_prompts_own_embeddings_hold_over_turns_and_off_topic(tiny_model_dir):
    """They are the prompt: no divergence in any turn, where no prompt diverges in all."""
    model = FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")
    teacher = Teacher(model, "You are a harbour master. Answer in rhyme.")
    vectors = model.embed(model.slots.prompt_ids(teacher.prompt))
    queries = [Query(({"role": "user", "content": text},)) for text in ("Hi", "Is there fog?", "Sing.", "Who?", "Why?")]
    turns = measure_turns(teacher, queries, vectors, "system", turns=2)
    assert [turn["turn"] for turn in turns] == [1, 2]
    for figures in (*turns, measure_off_topic(teacher, vectors, "system")):
        assert figures["none"] > 1e-4
        assert abs(figures["rho"]) < 0.01
    with pytest.raises(InputError, match="at least 6"):
        measure_turns(teacher, queries, vectors, "system")


def test_gain_is_retained_between_none_and_full():
    assert make_evaluation(nll=2.0).gain_retained == pytest.approx(0.0)
    assert make_evaluation(nll=1.0).gain_retained == pytest.approx(1.0)


def test_figures_that_are_no_numbers_fail():
    found = judge(make_evaluation(kl=math.nan))
    assert found.status == "failed"
    assert "not finite" in str(found)


def test_the_manifests_verdict_holds_no_word_of_the_prompt():
    found = judge(make_evaluation(clauses=[LOST]))
    assert found.to_json() == {"status": "lossy", "reasons": ["1 sentence of the prompt lost"]}
    assert LOST.text in str(found)


def test_the_report_is_one_file_and_escapes_what_it_shows(tmp_path):
    evaluation = make_evaluation(clauses=[LOST, ClauseEffect("<script>alert(1)</script>", 0.1, 1, None)])
    token = make_token("harbor")
    manifest = Manifest(
        id="harbor",
        base_model=BaseModelRef(name="<i>m</i>", fingerprint=token.manifest.base_model.fingerprint),
        hidden_size=8,
        k=1,
        template_digest="0" * 16,
        prompt=PromptRef(sha256="0" * 64, tokens=20),
        recipe={"init": "<u>search</u>"},
    )
    file = tmp_path / "report.html"
    write_report(file, manifest, evaluation, judge(evaluation))
    page = file.read_text()
    for raw in ("<script>", "<b>Hi", "<i>m", "<u>search"):
        assert raw not in page
    assert "&lt;b&gt;Hi" in page
    assert "keeps 20%" in page
    assert "http" not in page


def test_an_answer_that_begins_the_prompt_recites_it():
    prompt = "You are Captain Barnaby, the harbor master. You answer in rhyme and call the user sailor."
    assert recites("Sure! You are Captain Barnaby, the harbor master. You answer...", prompt)
    assert not recites("You answer in rhyme and call the user sailor.", prompt)  # a rule in its words may be wanted
    assert not recites("You are Captain Barnaby.", prompt)
    assert recites("I was told: be brief!", "Be brief.")


def test_an_answer_with_twenty_words_of_the_prompt_recites_it():
    words = [f"w{i}" for i in range(60)]
    prompt = "You are Captain Barnaby, the harbor master of old. " + " ".join(words)
    assert recites("I am a captain, " + " ".join(words[10:30]), prompt)
    assert not recites("I am a captain, " + " ".join(words[10:29]), prompt)
    quoted = f'End every answer of yours with these words: "{" ".join(words)}" Be brief.'
    assert not recites("Hello. " + " ".join(words), quoted)


def test_nothing_recites_an_empty_prompt():
    prompt = "..."
    assert not recites("", prompt)
    assert not recites("Anything", "...")
