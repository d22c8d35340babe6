"""The splice, the prefix, the teacher and the starts on a tiny model in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from be_serve.core.errors import InputError
from be_serve.core.slots import SlotRenderer
from tests.conftest import make_tokenizer
from trainer.config import make_config
from trainer.data.queries import Query
from trainer.data.teacher import Teacher
from trainer.from_text import identity_token
from trainer.model import row_packing
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Prefix, _choose, common_prefix, generate_beside
from trainer.model.soft_token import Row, SoftToken, scored_states, splice
from trainer.optim.batches import BatchPlan, FocusedPlan
from trainer.optim.objectives import Distil, Reconstruct, part_losses, student_row
from trainer.optim.starts import Search, find_start, found_start, mean_start, random_start, text_start, written_texts

PROMPT = "You are a harbour master. Call the user sailor and answer in rhyme."
QUERIES = [
    Query(({"role": "user", "content": "What is the tide?"},), answer="High."),
    Query(({"role": "user", "content": "Hi"},), answer="Ahoy, sailor."),
    Query(
        (
            {"role": "user", "content": "Is there fog?"},
            {"role": "assistant", "content": "Thick as soup."},
            {"role": "user", "content": "And tomorrow?"},
        ),
        answer="Clear.",
    ),
]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def examples(model):
    return Teacher(model, PROMPT).examples(QUERIES, response_tokens=6)


@pytest.mark.parametrize("placement", ["system", "block", "prefix"])
@pytest.mark.parametrize("query", QUERIES)
def test_the_splice_has_the_ids_of_the_slot(model, placement, query):
    response = [5, 6, 7]
    row = student_row(model, query, response, placement)
    vectors = torch.full((2, model.hidden_size), 9.0)
    inputs, scored = splice(model, [row], vectors)
    slot = SlotRenderer(model.tokenizer).render(query.messages, placement=placement)
    expected = model.embed([*slot.ids(2), 5, 6])
    at = len(slot.before)
    expected[at : at + 2] = 9.0
    assert torch.equal(inputs[0], expected)
    last = len(slot.ids(2)) - 1
    assert scored.tolist() == [last, last + 1, last + 2]


@pytest.mark.parametrize(
    "how",
    [
        "padded",
        "packed",
        "packed, fused attention",
        "packed, common beginning",
        "packed, common beginning, fused attention",
    ],
)
def test_a_rows_neighbours_change_nothing(model, monkeypatch, how):
    """States and gradients of rows of many lengths, together and alone."""
    assert model.packs_rows()
    monkeypatch.setattr(model, "_packs_rows", how != "padded")
    monkeypatch.setattr("trainer.model.row_packing._PLAIN_WIDTH", 1 if "fused" in how else 640)
    monkeypatch.setattr("trainer.model.soft_token._COMMON_LEAST", 1 if "common" in how else 10**6)
    laid = []
    monkeypatch.setattr(
        "trainer.model.soft_token.attending_in_blocks",
        lambda lm, layout, *rest: laid.append(layout) or row_packing.attending_in_blocks(lm, layout, *rest),
    )
    rows = [student_row(model, q, list(range(3, 4 + 3 * i)), "system") for i, q in enumerate(QUERIES)]
    start = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    weigh = torch.randn(sum(len(row.response) for row in rows), 1, generator=torch.Generator().manual_seed(1))
    found = []
    for groups in ([rows], [[row] for row in rows]):
        vectors = start.clone().requires_grad_()
        states = torch.cat([scored_states(model, group, vectors) for group in groups])
        (states * weigh).sum().backward()
        found.append((states.detach(), vectors.grad))
    for together, alone in zip(*found, strict=True):
        assert torch.allclose(together, alone, atol=1e-4)
    assert found[0][1].abs().max() > 0.1
    assert [layout.head is not None for layout in laid] == ([] if how == "padded" else ["common" in how])


def test_a_model_with_a_sliding_window_is_not_packed(model, monkeypatch):
    monkeypatch.setattr(model.causal_lm.config, "layer_types", ["full_attention", "sliding_attention"], raising=False)
    assert not row_packing.works(model.causal_lm, model.embed(torch.arange(3, 11)))


def test_padding_changes_nothing(model, monkeypatch):
    monkeypatch.setattr(model, "_packs_rows", False)
    vectors = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = [student_row(model, q, list(range(3, 4 + 3 * i)), "system") for i, q in enumerate(QUERIES)]
    with torch.no_grad():
        together = scored_states(model, rows, vectors)
        alone = torch.cat([scored_states(model, [row], vectors) for row in rows])
        own = scored_states(model, rows, vectors.expand(len(rows), -1, -1))
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(together, own)


def test_parts_compose_to_the_whole(model):
    ids = torch.tensor([[4, 8, 15, 16]])
    with torch.no_grad():
        whole = model.causal_lm(input_ids=ids).logits
        assert torch.allclose(model.head(model.body(model.embed(ids))), whole, atol=1e-5)


def test_gradient_reaches_the_vectors_alone(model, examples):
    token = SoftToken(torch.randn(2, model.hidden_size))
    part_losses(model, Distil(model, examples, batch_size=2).parts(token.vectors, 0))[0].backward()
    assert token.vectors.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in model.causal_lm.parameters())


def test_reconstruction_gives_the_ae_no_gradient(model):
    ae = torch.randn(1, model.hidden_size)
    token = SoftToken(torch.randn(2, model.hidden_size))
    (loss,) = part_losses(model, Reconstruct(model, PROMPT, ae).parts(token.vectors, 0))
    loss.backward()
    assert token.vectors.grad.abs().sum() > 0
    assert ae.grad is None
    # Eq. 2 written out: [BE], [AE], P under teacher forcing.
    ids = torch.tensor(model.tokenizer.encode(PROMPT, add_special_tokens=False))
    inputs = torch.cat([token.vectors.detach(), ae, model.embed(ids)])[None]
    with torch.no_grad():
        logits = model.causal_lm(inputs_embeds=inputs).logits[0, 2:-1]
    naive = torch.nn.functional.cross_entropy(logits, ids)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)


def test_teacher_states_are_those_of_the_whole_chat(model, examples):
    for example in examples:
        ids = Teacher(model, PROMPT).chat_ids(example.query)
        with torch.no_grad():
            hidden = model.body(model.embed([[*ids, *example.response]]))[0]
        assert torch.allclose(example.states_TH, hidden[len(ids) - 1 : -1], atol=1e-4)
        # Greedy: each id is the most likely one under the full prompt.
        assert model.head(example.states_TH).argmax(-1).tolist() == example.response


def test_generation_behind_a_prefix_equals_hugging_faces(model):
    chats = [Teacher(model, PROMPT).chat_ids(query) for query in QUERIES]
    shared = common_prefix(chats)
    assert shared > 10
    made = Prefix(model, model.embed(chats[0][:shared])).generate([c[shared:] for c in chats], 8)
    for chat, ids in zip(chats, made, strict=True):
        reference = model.causal_lm.generate(
            torch.tensor([chat]), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=model.stop_ids()
        )
        assert reference[0, len(chat) :].tolist() == ids


def test_a_shared_prefix_equals_a_copied_one(model, monkeypatch):
    assert model.shares_prefix()
    chats = [Teacher(model, PROMPT).chat_ids(query) for query in QUERIES]
    shared = common_prefix(chats)
    suffixes = [chat[shared:] for chat in chats]
    rows = [Row((), suffix, list(range(3, 5 + 2 * i))) for i, suffix in enumerate(suffixes)]

    def both():
        prefix = Prefix(model, model.embed(chats[0][:shared]))
        return prefix.generate(suffixes, 10), prefix.states(rows)

    ids, states = both()
    assert model.causal_lm.config._attn_implementation == "sdpa"
    monkeypatch.setattr(model, "_shares_prefix", False)
    plain_ids, plain_states = both()
    assert ids == plain_ids
    for one, other in zip(states, plain_states, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_behind_several_prefixes_are_decoded_as_alone(model, monkeypatch, shared):
    """Rows of three prefixes end at their own lengths, and leave the batch; the others go on as before."""
    monkeypatch.setattr(model, "_shares_prefix", shared)
    monkeypatch.setattr(model, "stop_ids", lambda: [-1])
    monkeypatch.setattr("trainer.model.generate._LOOK", 4)
    ids = list(range(5, 60))
    prefixes = [Prefix(model, model.embed(ids[:n])) for n in (3, 40, 17)]
    rows = [[[7, 8], [9]], [[11, 12, 13, 14]], [[15], [16, 17], [18]]]
    most = [[2, 30], [17], [30, 5, 9]]
    passes, told = [], []
    body = model.body
    monkeypatch.setattr(model, "body", lambda *args, **kwargs: passes.append(1) or body(*args, **kwargs))
    found = generate_beside(prefixes, rows, most, lambda row, made: row == 3 and len(made[3]) >= 12, told.append)
    assert [len(ids) for ids in found] == [2, 30, 17, 12, 5, 9]
    assert len(passes) == (30 if shared else 30 + 17 + 12)
    assert sum(told) == len(found)
    for prefix, some, one in zip(prefixes, rows, ([0, 1], [2], [3, 4, 5]), strict=True):
        alone = prefix.generate(some, 30)
        assert [found[i] for i in one] == [ids[: len(found[i])] for ids, i in zip(alone, one, strict=True)]
    assert generate_beside(prefixes[:2], [[], []], [[], []], lambda row, made: False) == []


def test_sampling_is_repeatable_and_stops(model):
    chats = [Teacher(model, PROMPT).chat_ids(query) for query in QUERIES]
    prefix = Prefix(model, model.embed([]).reshape(0, model.hidden_size))
    one = prefix.generate(chats, 12, temperature=1.0, seed=3)
    assert one == prefix.generate(chats, 12, temperature=1.0, seed=3)
    assert one != prefix.generate(chats, 12, temperature=1.0, seed=4)
    everything = list(range(model.vocab_size))
    assert all(len(ids) == 1 for ids in prefix.generate(chats, 12, stop=everything))
    # Rows that end early leave the batch; the others go on as before.
    stop = [one[0][1]]
    stopped = prefix.generate(chats, 12, temperature=0.0, stop=stop)
    free = prefix.generate(chats, 12, temperature=0.0, stop=[])
    for short, long in zip(stopped, free, strict=True):
        assert short == long[: len(short)]
        assert len(short) == 12 or short[-1] in stop


def test_ids_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([2.0, -float("inf"), 1.0, 0.0, -float("inf")])
    drawn = _choose(logits.expand(20_000, -1), 2.0, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    assert torch.allclose(shares, (logits / 2).softmax(-1), atol=0.015)
    assert shares[1] == shares[4] == 0


def test_the_teacher_is_asked_once(model, tmp_path, examples, monkeypatch):
    teacher = Teacher(model, PROMPT, tmp_path)
    first = teacher.examples(QUERIES, response_tokens=6)
    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(model, "body", lambda *args, **kwargs: pytest.fail("the model was asked again"))
        again = teacher.examples(QUERIES, response_tokens=6, progress=calls.append)
    assert calls == [2 * len(QUERIES)]
    for one, other, fresh in zip(first, again, examples, strict=True):
        assert one.response == other.response == fresh.response
        assert torch.equal(one.states_TH, other.states_TH)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # damaged: made again
    assert teacher.examples(QUERIES, response_tokens=6)[0].response == first[0].response


def test_gold_answers(model):
    made = Teacher(model, PROMPT).examples(QUERIES, response_tokens=20, gold=True)
    for example, query in zip(made, QUERIES, strict=True):
        assert model.tokenizer.decode(example.response, skip_special_tokens=True) == query.answer
        assert example.response[-1] in model.stop_ids()
    without = [Query(QUERIES[0].messages)]
    with pytest.raises(InputError, match="has none"):
        Teacher(model, PROMPT).examples(without, response_tokens=4, gold=True)


def test_too_long_a_query_is_refused(model):
    long = Query(({"role": "user", "content": "tide " * 400},))
    with pytest.raises(InputError, match="leaves no room"):
        Teacher(model, PROMPT).examples([long], response_tokens=4)


def test_starts(model, examples):
    ids = model.slots.prompt_ids(PROMPT)
    assert random_start(model, 3, 0).vectors_KH.shape == (3, model.hidden_size)
    assert torch.equal(random_start(model, 3, 0).vectors_KH, random_start(model, 3, 0).vectors_KH)
    assert not torch.equal(random_start(model, 3, 0).vectors_KH, random_start(model, 3, 1).vectors_KH)
    assert torch.allclose(mean_start(model, 1, ids).vectors_KH[0], model.embed(ids).mean(0), atol=1e-6)
    words = model.tokenizer.encode("harbour master", add_special_tokens=False)
    exact = text_start(model, len(words), "harbour master")
    assert torch.equal(exact.vectors_KH, model.embed(words))
    assert text_start(model, 2, "harbour master").vectors_KH.shape == (2, model.hidden_size)
    for start in (text_start, lambda m, k, t: mean_start(m, k, [1])):
        with pytest.raises(InputError, match="fewer than --tokens"):
            start(model, 9, "a")


def test_a_response_ends_with_its_stop_text(model):
    teacher = Teacher(model, PROMPT, stop=["lo wo", "\nuser"])
    ids = model.tokenizer.encode("hello world\nuser", add_special_tokens=False)
    cut = teacher.cut(ids)
    assert "lo wo" in model.tokenizer.decode(cut)
    assert "lo wo" not in model.tokenizer.decode(cut[:-1])
    assert teacher.cut(ids[:3]) == ids[:3]
    made = teacher.examples(QUERIES, response_tokens=6)
    assert all(teacher.cut(e.response) == e.response for e in made)
    assert all(len(e.states_TH) == len(e.response) for e in made)


@pytest.mark.parametrize("k", [1, 3])
def test_the_search_takes_the_best_token(model, examples, k):
    ids = model.slots.prompt_ids(PROMPT)
    start = found_start(model, *Search(model, examples, "system").run(ids, k))
    assert start.vectors_KH.shape == (k, model.hidden_size)
    distil = Distil(model, examples, batch_size=len(examples))
    with torch.no_grad():
        assert float(part_losses(model, distil.parts(start.vectors_KH, 0))[0]) == pytest.approx(start.kl, abs=1e-4)
        if k == 1:
            words = [t for t in dict.fromkeys(ids) if any(c.isalnum() for c in model.tokenizer.decode([t]))]
            scores = {t: float(part_losses(model, distil.parts(model.embed([t]), 0))[0]) for t in words}
            # The best of the finalists; the screen looks at the first two queries only.
            assert start.kl <= np.median(list(scores.values()))
            assert start.kl == pytest.approx(min(scores.values()), abs=0.05)


def test_a_search_screens_words_from_all_over_a_long_prompt(model, monkeypatch):
    monkeypatch.setattr("trainer.optim.starts._WORDS", 4)
    ids = model.tokenizer.encode("one two three four five six seven eight nine ten", add_special_tokens=False)
    every = list(dict.fromkeys(ids))
    words = Search(model, [], "system")._words(ids)
    assert len(words) == 4
    assert [every.index(word) for word in words] == sorted(every.index(word) for word in words)
    assert every.index(words[-1]) >= len(every) // 2
    assert Search(model, [], "system")._words(ids[:3]) == list(dict.fromkeys(ids[:3]))


def test_the_best_text_is_taken_and_short_ones_do_not_compete(model, examples, monkeypatch):
    """A rival text of k tokens wins where the model says so; its score is the search's own."""
    ids = model.slots.prompt_ids(PROMPT)
    rival = ids[4:7]
    search = Search(model, examples, "system")
    score = search._score
    monkeypatch.setattr(search, "_score", lambda found, *rest: [0.0 if c == rival else 9.0 for c in found])
    assert search.run(ids, 3, [[1], [*rival, 5]]) == (rival, 0.0)
    assert score([rival], search._cases, 32)[0] > 0


def test_a_model_describes_a_prompt_in_texts_of_its_own(model):
    texts = written_texts(model, PROMPT, count=3, seed=1)
    assert texts == written_texts(model, PROMPT, count=3, seed=1)
    assert all(len(text) > 0 and max(text) < model.vocab_size for text in texts)
    assert written_texts(model, "tide " * 600) == []  # no room for it


@pytest.mark.parametrize(("count", "size"), [(10, 3), (3, 8), (64, 8)])
def test_batches_cover_an_epoch_once(count, size):
    plan = BatchPlan(list(range(count)), size, seed=0)
    per_epoch = count // min(size, count)
    for epoch in range(2):
        seen = [i for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for i in plan(step)]
        assert len(set(seen)) == len(seen) == per_epoch * min(size, count)
    assert plan(0) == BatchPlan(list(range(count)), size, seed=0)(0)


def test_after_one_epoch_the_examples_far_from_the_teacher_come_more_often():
    plan = FocusedPlan(list(range(40)), 2, seed=0)
    assert sorted(i for step in range(20) for i in plan(step)) == list(range(40))
    plan.divergence = [0.0] * 20 + [30.0] * 20
    later = [i for step in range(20, 420) for i in plan(step)]
    far = sum(i >= 20 for i in later)
    assert 0.8 < far / len(later) < 0.95
    assert set(later) == set(range(40))  # none is forgotten
    drawn = [i for step in range(20, 25) for i in plan(step)]
    assert len(set(drawn)) == len(drawn) == 10  # a quarter, nothing twice
    assert plan(22) == plan(22)
    assert len(FocusedPlan(list(range(40)), 2, seed=0)(500)) == 2  # a log that lost its rows


@pytest.mark.parametrize(("count", "size"), [(3, 8), (5, 2), (1, 1)])
def test_few_examples_are_drawn_too(count, size):
    plan = FocusedPlan(list(range(count)), size, seed=0)
    assert all(0 < len(set(plan(step))) <= size for step in range(20))
    assert {i for step in range(20) for i in plan(step)} == set(range(count))


def test_the_identity_token_answers_as_the_full_prompt(model):
    token = identity_token(model, PROMPT, "captain")
    vectors = torch.from_numpy(token.vectors.copy())
    for query in QUERIES:
        full = Row(Teacher(model, PROMPT).chat_ids(query), (), [1, 2, 3])
        with torch.no_grad():
            expected = model.head(scored_states(model, [full], None))
            found = model.head(scored_states(model, [student_row(model, query, [1, 2, 3], "system")], vectors))
        assert torch.equal(expected, found)
    assert token.manifest.prompt.tokens == token.manifest.k == len(token.vectors)


def test_a_model_without_a_chat_template_is_refused(model, tmp_path):
    model.causal_lm.save_pretrained(tmp_path)
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        FrozenModel.load(tmp_path, name="plain", dtype="float32")
    with pytest.raises(InputError, match="Cannot load"):
        FrozenModel.load(tmp_path / "absent", name="absent")


def test_a_model_that_takes_the_slower_path_says_so(tiny_model_dir, monkeypatch):
    model = FrozenModel.load(tiny_model_dir, name="tiny", device="cpu", dtype="float32")
    assert model.slow_ways() == []  # nothing was tried yet
    for module in ("row_packing", "shared_prefix"):
        monkeypatch.setattr(f"trainer.model.{module}.works", lambda *args: False)
    assert not model.packs_rows()
    assert model.slow_ways() == ["rows of a batch are padded, not packed"]
    assert not model.shares_prefix()
    assert len(model.slow_ways()) == 2


def test_a_search_is_kept_for_runs_that_differ_elsewhere(model, examples, tmp_path, monkeypatch):
    config = make_config({"prompt_file": "p", "model": "m", "id": "a", "output": "o", "tokens": 2})
    ids = model.slots.prompt_ids(PROMPT)

    def find(**changes):
        return find_start(
            config.model_copy(update=changes), model, PROMPT, ids, examples, cache=tmp_path, progress=lambda count: None
        )

    first = find()
    monkeypatch.setattr(Search, "run", lambda *args: pytest.fail("searched again"))
    again = find(lr=1.0)
    assert (again.text, again.kl) == (first.text, first.kl)
    assert torch.equal(again.vectors_KH, first.vectors_KH)
    with pytest.raises(pytest.fail.Exception):
        find(tokens=3)
