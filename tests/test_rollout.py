"""The contract of every rollout engine, and what engines share. A new one: a case in make_engine.

Legend: R requests, V vocabulary, T tokens of one path.
"""

import collections
import copy
import functools
import pickle
import random
from dataclasses import replace

import chat_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch._dynamo.testing import CompileCounterWithBackend

from vpgea_fast.config import VllmEngineConfig
from vpgea_fast.rollout import hf, packed
from vpgea_fast.rollout.engine import Sampling, answer_only, in_waves, request_seed, split_path
from vpgea_fast.rollout.forward import ROOM
from vpgea_fast.rollout.hf import BLOCK, PACK_FROM, HFEngine, draw
from vpgea_fast.spans import Tag
from vpgea_fast.types import Finish, SampleRequest, Stream

CLOSE, EOS = 3, 1
GREEDY = Sampling(max_new_tokens=24, think_close_id=CLOSE, eos_ids=(EOS,), temperature=0.0)
SHORT = Sampling(max_new_tokens=24, think_close_id=CLOSE, eos_ids=(EOS,))
ENDLESS = Sampling(max_new_tokens=90, think_close_id=1000, eos_ids=())


@pytest.fixture(params=["hf", "packed", pytest.param("vllm", marks=pytest.mark.vllm)])
def make_engine(request, tmp_path, monkeypatch):
    """Makes an engine that holds the weights of a model: `make_engine(model, max_batch=64)`.
    `packed` is hf with every weight packed."""
    made = []
    if request.param == "packed":
        monkeypatch.setattr(packed, "LEAST", 1)
        monkeypatch.setattr(hf, "PACK_FROM", 1)

    def vllm_engine(model, *, max_batch):
        from vpgea_fast.rollout.vllm.engine import VllmEngine

        path = str(tmp_path / str(len(made)))
        model.config.save_pretrained(path)
        settings = VllmEngineConfig(kv_cache_gib=0.125)
        made.append(
            VllmEngine(
                path,
                max_batch=max_batch,
                dtype=torch.float32,
                device=torch.device("cpu"),
                cfg=settings,
            )
        )
        made[-1].load_weights(model.named_parameters())
        return made[-1]

    yield {"hf": HFEngine, "packed": HFEngine, "vllm": vllm_engine}[request.param]
    for engine in made:
        engine.close()


@pytest.fixture
def random_qwen2(random_qwen2):
    """Heads of 32 numbers, the smallest that vLLM takes."""
    return functools.partial(random_qwen2, hidden=64, initializer_range=0.14)


@pytest.fixture
def model(random_qwen2):
    return random_qwen2()


TAG = "/>"


@pytest.fixture(scope="session")
def tag():
    """A closing tag that several of 53 tokens spell, in many ways: a byte-level BPE of few letters,
    one of which has two bytes."""
    letters = "ab/>é"
    bytes_ = {chat_models.BYTE_LETTERS[b] for b in letters.encode()}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The first four are what a random model is told to be special.
    special = [f"<{name}>" for name in ("bos", "eos", "pad", "close")]
    trainer = trainers.BpeTrainer(
        vocab_size=53, special_tokens=special, initial_alphabet=[*bytes_], show_progress=False
    )
    rng = random.Random(0)
    texts = ["".join(rng.choices(letters, k=40)) for _ in range(200)]
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == 53

    def decode(ids):
        return tokenizer.decode(list(ids), skip_special_tokens=False)

    return Tag(TAG, tuple(tokenizer.encode(TAG).ids), decode)


def cut_by_hand(path, tag, sampling):
    """Where a path should end, of all tokens that it would draw: (thought, all, closed)."""
    ids = tokens_of(path)
    stops = [n for n, token in enumerate(ids, 1) if token in sampling.eos_ids]
    for n in range(1, min(len(ids), sampling.max_new_tokens) + 1):
        if tag.text in tag.decode(ids[:n]):
            end = n + sampling.max_answer_tokens if sampling.full_answer else n
            return n, min([end, len(ids), *(s for s in stops if s >= n)]), True
        if n in stops:
            return n, n, False
    return sampling.max_new_tokens, sampling.max_new_tokens, False


def some_requests(*, questions=4, paths=3, seed=0, vocab=53):
    """`paths` requests for each of some prompts of different lengths, one of them of one token."""
    rng = random.Random(seed)
    requests = []
    for q in range(questions):
        prompt = torch.tensor([rng.randrange(4, vocab) for _ in range(1 + 5 * q)])
        for index in range(paths):
            stream = "posterior" if q % 2 else "prior"
            request_key = request_seed(seed, 0, f"q{q}", stream, index)
            requests.append(
                SampleRequest(
                    question_id=f"q{q}",
                    stream=stream,
                    index=index,
                    prompt_ids=prompt,
                    seed=request_key,
                )
            )
    return requests


def tokens_of(path):
    return (*path.z_ids.tolist(), *path.answer_ids.tolist())


def full_forward(model, prompt_ids, token_ids):
    """(T, V) float32 logits that predict each token, from one uncached forward of the one row."""
    ids = torch.cat([prompt_ids, token_ids])[None]
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float()


def assert_same_tokens(paths, others):
    assert [tokens_of(p) for p in paths] == [tokens_of(p) for p in others]


def assert_equal_paths(paths, others):
    assert_same_tokens(paths, others)
    for path, other in zip(paths, others, strict=True):
        assert torch.equal(path.response_logps, other.response_logps)
        assert path.finish == other.finish


def assert_logps_match(model, requests, paths, temperature):
    for request, path in zip(requests, paths, strict=True):
        logits_TV = full_forward(model, request.prompt_ids, path.z_ids)
        expected_TV = (logits_TV / temperature).log_softmax(-1)
        expected_T = expected_TV.gather(-1, path.z_ids[:, None])[:, 0]
        torch.testing.assert_close(path.logps, expected_T, rtol=0, atol=1e-4)


# --- the contract -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize(
    "variant",
    [{}, {"num_key_value_heads": 1, "heads": 4, "hidden": 128, "tie_word_embeddings": False}],
)
def test_logps_are_those_of_a_full_forward(make_engine, random_qwen2, temperature, variant):
    """Ragged prompts, rows that leave at different steps, and 90 tokens, so caches grow."""
    model, requests = random_qwen2(**variant), some_requests()
    engine = make_engine(model, max_batch=64)
    for limits in (SHORT, ENDLESS):
        sampling = replace(limits, temperature=temperature)
        paths = engine.generate(requests, sampling)
        assert_logps_match(model, requests, paths, temperature)
    assert {path.length for path in paths} == {90}


def test_paths_come_in_the_order_of_the_requests(make_engine, model):
    requests = some_requests()
    random.Random(1).shuffle(requests)
    paths = make_engine(model, max_batch=5).generate(requests, SHORT)
    wanted = [(r.question_id, r.stream, r.index) for r in requests]
    assert [(p.question_id, p.stream, p.index) for p in paths] == wanted


def test_tokens_depend_on_the_seed_alone(make_engine, model):
    """Not on the order of the requests, their company, the batch split, or earlier calls."""
    requests = some_requests(questions=5, paths=4)
    engine = make_engine(model, max_batch=64)
    together = engine.generate(requests, SHORT)
    shuffled = list(enumerate(requests))
    random.Random(2).shuffle(shuffled)
    again = engine.generate([request for _, request in shuffled], SHORT)
    assert_same_tokens(again, [together[number] for number, _ in shuffled])
    assert_same_tokens(make_engine(model, max_batch=3).generate(requests, SHORT), together)
    one_by_one = [engine.generate([request], SHORT)[0] for request in requests]
    assert_same_tokens(one_by_one, together)
    for path, alone in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(path.logps, alone.logps, rtol=0, atol=1e-5)


def test_another_index_draws_other_tokens(make_engine, model):
    paths = make_engine(model, max_batch=64).generate(some_requests(paths=8), ENDLESS)
    assert len({tokens_of(path) for path in paths}) == len(paths)


def test_a_longer_limit_only_continues(make_engine, model):
    requests = some_requests()
    engine = make_engine(model, max_batch=64)
    short = engine.generate(requests, Sampling(30, 1000, ()))
    long = engine.generate(requests, ENDLESS)
    assert [tokens_of(p) for p in short] == [tokens_of(p)[:30] for p in long]


@pytest.mark.parametrize("check_every", [1, 16])
def test_thought_and_answer_may_share_one_limit(model, tag, check_every):
    """Both engines' cuts are `split_path`'s: the paths of a wider draw, cut at the limit."""
    engine = HFEngine(model, max_batch=64, check_every=check_every)
    free = Sampling(40, think_close_id=1000, eos_ids=())
    requests, kinds = some_requests(paths=24), collections.Counter()
    # The second limit is not read.
    closing = Sampling(14, CLOSE, (EOS,), full_answer=True, max_answer_tokens=1, joint_limit=True)
    for joint in (closing, replace(closing, think_close_id=-1, tag=tag)):
        assert joint.limit == 14
        pairs = zip(engine.generate(requests, joint), engine.generate(requests, free), strict=True)
        for path, whole in pairs:
            ids, drawn = tokens_of(path), whole.z_ids[:14].tolist()
            ends = drawn.index(EOS) + 1 if EOS in drawn else 14
            thought = joint.closed_at(drawn[:ends])
            assert ids == tuple(drawn[:ends])
            assert path.closed == (thought > 0)
            assert path.z_ids.numel() == (thought or ends)
            assert path.finish == ("stop" if ids[-1] == EOS else "length")
            kinds[path.closed, path.finish] += 1
    assert len(kinds) == 4, kinds
    cut = functools.partial(split, max_new_tokens=3, max_answer_tokens=9, joint_limit=True)
    assert cut([4, CLOSE, 6, 7]) == ([4, CLOSE], [6], True, "length")
    assert cut([4, CLOSE, EOS]) == ([4, CLOSE], [EOS], True, "stop")
    assert cut([4, 5, CLOSE], finish="length") == ([4, 5, CLOSE], [], True, "length")


@pytest.mark.parametrize("full_answer", [False, True])
def test_stop_reasons(make_engine, model, full_answer):
    """Every path ends exactly where its tokens say; all kinds of end occur among 96 paths."""
    sampling = replace(SHORT, full_answer=full_answer, max_answer_tokens=9)
    kinds = collections.Counter()
    for path in make_engine(model, max_batch=64).generate(some_requests(paths=24), sampling):
        z, answer = path.z_ids.tolist(), path.answer_ids.tolist()
        assert len(path.logps) == len(z) == path.length <= 24
        assert not {CLOSE, EOS} & set(z[:-1])
        assert EOS not in answer[:-1]
        assert path.closed == (z[-1] == CLOSE)
        if answer:
            assert full_answer
            assert path.closed
        if path.closed and full_answer:
            assert 1 <= len(answer) <= 9
            assert path.finish == ("stop" if answer[-1] == EOS else "length")
            assert path.finish == "stop" or len(answer) == 9
        elif path.finish == "length":
            assert len(z) == 24
            assert z[-1] not in (CLOSE, EOS)
        else:
            assert z[-1] in (CLOSE, EOS)
        kinds[path.closed, path.finish] += 1
    expected = {(True, "stop"), (False, "stop"), (False, "length")}
    assert set(kinds) == (expected | {(True, "length")} if full_answer else expected)


def test_one_token_limits(make_engine, model):
    requests = some_requests(paths=40)
    for full_answer in (False, True):
        sampling = replace(SHORT, max_new_tokens=1, max_answer_tokens=1, full_answer=full_answer)
        paths = make_engine(model, max_batch=64).generate(requests, sampling)
        assert {path.length for path in paths} == {1}
        assert any(path.closed for path in paths)
        for path in paths:
            assert len(path.answer_ids) == (full_answer and path.closed)


def test_greedy_is_the_argmax_chain(make_engine, model):
    requests = some_requests(paths=1)
    paths = make_engine(model, max_batch=64).generate(requests, GREEDY)
    for request, path in zip(requests, paths, strict=True):
        chain, ids = [], request.prompt_ids
        while len(chain) < 24 and not {CLOSE, EOS} & set(chain):
            with torch.no_grad():
                chain.append(model(ids[None], use_cache=False).logits[0, -1].argmax().item())
            ids = torch.cat([request.prompt_ids, torch.tensor(chain)])
        assert path.z_ids.tolist() == chain
    assert_logps_match(model, requests, paths, temperature=1.0)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_draws_follow_the_softmax(make_engine, random_qwen2, top_p):
    """Chi-square of 6000 first tokens against float64, bounded by its 0.999 quantile."""
    model = random_qwen2(vocab=11, initializer_range=0.1)
    prompt = torch.tensor([4, 5, 6])
    sampling = Sampling(1, 1000, (), temperature=1.3, top_p=top_p)
    seeds = [request_seed(7, 0, "q", "prior", index) for index in range(6000)]
    requests = [
        SampleRequest(question_id="q", stream="prior", index=i, prompt_ids=prompt, seed=seed)
        for i, seed in enumerate(seeds)
    ]
    engine = make_engine(model, max_batch=2000)
    paths = engine.generate(requests, sampling)
    counts_V = torch.bincount(torch.cat([path.z_ids for path in paths]), minlength=11).double()

    logits_V = full_forward(model, prompt, torch.tensor([0]))[0].double()
    order = (p_V := (logits_V / 1.3).softmax(-1)).argsort(descending=True)
    size = next(k for k in range(1, 12) if k == 11 or p_V[order[:k]].sum() >= top_p)
    kept = order[:size]
    assert counts_V[kept].sum() == 6000
    expected = 6000 * p_V[kept] / p_V[kept].sum()
    assert expected.min() > 5
    chi_square = ((counts_V[kept] - expected) ** 2 / expected).sum().item()
    quantile = {4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3, 8: 26.1, 9: 27.9, 10: 29.6}[size - 1]
    assert chi_square < quantile
    # The log-prob is that of the full softmax, truncated or not, or not told.
    if top_p < 1 and not engine.full_softmax:
        assert all(path.logps.isnan().all() for path in paths)
        return
    logp = {path.z_ids.item(): path.logps.item() for path in paths}
    assert logp == pytest.approx({t: p_V[t].log().item() for t in logp}, abs=1e-4)


def test_new_weights_change_the_output(make_engine, random_qwen2):
    model, other = random_qwen2(seed=0), random_qwen2(seed=1)
    requests, engine = some_requests(), make_engine(model, max_batch=64)
    before = engine.generate(requests, GREEDY)
    expected = make_engine(other, max_batch=64).generate(requests, GREEDY)
    assert [tokens_of(p) for p in before] != [tokens_of(p) for p in expected]
    engine.load_weights(other.named_parameters())
    assert_same_tokens(engine.generate(requests, GREEDY), expected)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unknown", r"unknown model\.extra"),
        ("missing", r"missing model\.norm\.weight"),
        ("shape", r"model\.norm\.weight: got \(1, 64\), expected \(64,\)"),
    ],
)
def test_an_engine_with_unfit_weights_does_not_sample(make_engine, random_qwen2, fault, message):
    requests, engine = some_requests(), make_engine(random_qwen2(seed=0), max_batch=64)
    before = engine.generate(requests, GREEDY)
    whole = dict(random_qwen2(seed=0).named_parameters())
    named = dict(random_qwen2(seed=1).named_parameters())
    norm = named.pop("model.norm.weight")
    faulty = {
        "unknown": {"model.norm.weight": norm, "model.extra": norm},
        "missing": {},
        "shape": {"model.norm.weight": norm[None]},
    }[fault]
    with pytest.raises(ValueError, match=message):
        engine.load_weights((named | faulty).items())
    with pytest.raises(ValueError, match="load_weights first"):
        engine.generate(requests, GREEDY)
    engine.load_weights(whole.items())
    assert_same_tokens(engine.generate(requests, GREEDY), before)


def test_a_prompt_without_room_is_refused_before_anything_is_drawn(make_engine, random_qwen2):
    engine = make_engine(random_qwen2(max_position_embeddings=40), max_batch=64)
    fits = SampleRequest(
        question_id="fits", stream="prior", index=0, prompt_ids=torch.full((16,), 5), seed=0
    )
    long = SampleRequest(
        question_id="long", stream="prior", index=0, prompt_ids=torch.full((17,), 5), seed=0
    )
    assert len(engine.generate([fits], SHORT)) == 1
    with pytest.raises(ValueError, match=r"long: .* 17 tokens .* need 41 positions.*has 40"):
        engine.generate([fits, long], SHORT, on_progress=pytest.fail)
    with pytest.raises(ValueError, match="no tokens"):
        engine.generate(
            [
                SampleRequest(
                    question_id="none",
                    stream="prior",
                    index=0,
                    prompt_ids=torch.tensor([]).long(),
                    seed=0,
                )
            ],
            SHORT,
        )


def test_progress_counts_every_path_once(make_engine, model):
    finished = []
    engine = make_engine(model, max_batch=7)
    assert engine.generate([], SHORT, finished.append) == []
    engine.generate(some_requests(), SHORT, finished.append)
    assert sum(finished) == 12
    assert min(finished) >= 0


def test_a_stream_gives_every_path_when_it_has_ended(make_engine, model):
    """The same paths, bit for bit, each with its place, and not all of them at the end."""
    requests = some_requests()
    engine = make_engine(model, max_batch=7)
    looks = [look for look in engine.stream(requests, SHORT) if look]
    assert len(looks) > 1
    places = [ended.place for look in looks for ended in look]
    assert sorted(places) == list(range(12))
    for place, path in (ended for look in looks for ended in look):
        assert path.question_id == requests[place].question_id
    drawn = dict(ended for look in looks for ended in look)
    assert_equal_paths([drawn[place] for place in range(12)], engine.generate(requests, SHORT))


def test_a_wave_drawn_alone_is_the_same_to_the_last_bit(make_engine, model):
    """What a killed evaluation draws again: any wave, whatever came before it."""
    requests = some_requests()
    engine = make_engine(model, max_batch=7)
    waves = in_waves(requests, engine.wave)
    assert [len(wave) for wave in waves] == ([12] if engine.wave is None else [7, 5])
    together = engine.generate(requests, SHORT)
    for wave in reversed(waves):
        alone = engine.generate([requests[place] for place in wave], SHORT)
        assert_equal_paths(alone, [together[place] for place in wave])


def test_a_stream_refuses_before_its_first_look(make_engine, model):
    long = Sampling(10_000, think_close_id=3, eos_ids=())
    with pytest.raises(ValueError, match="positions"):
        make_engine(model, max_batch=7).stream(some_requests(), long)


def test_nan_weights_are_an_error_with_the_question(make_engine, model):
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    engine = make_engine(model, max_batch=64)
    for sampling in (SHORT, GREEDY):
        with pytest.raises(RuntimeError, match=r"question q0 at decode step 0.*weights.*dtype"):
            engine.generate(some_requests(), sampling)


# --- the transformers engine ----------------------------------------------------------------------


def test_the_callers_module_is_left_as_it_was(model):
    """Weights shared, each module's mode restored (also after an error), no graph, no copy."""
    engine = HFEngine(model, max_batch=64)
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    path = engine.generate(some_requests(), SHORT)[0]
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError):
        engine.generate(some_requests(), SHORT)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not path.logps.requires_grad
    version = model.model.norm.weight._version
    engine.load_weights(model.named_parameters())
    assert model.model.norm.weight._version == version


def test_batches_do_not_depend_on_the_order_of_the_requests(model):
    """Waves of 5 rows: the log-probs are the same bits, so the batches were the same."""
    requests = some_requests()
    engine = HFEngine(model, max_batch=5)
    paths = engine.generate(requests, SHORT)
    for path, again in zip(paths, engine.generate(requests[::-1], SHORT)[::-1], strict=True):
        assert torch.equal(path.logps, again.logps)


@pytest.mark.parametrize("full_answer", [False, True])
def test_looking_rarely_changes_no_path(model, full_answer):
    """7 steps between looks divide neither limit; finished rows draw on meanwhile."""
    requests = some_requests(paths=8)
    sampling = replace(SHORT, full_answer=full_answer, max_answer_tokens=9)
    rarely = HFEngine(model, max_batch=16, check_every=7).generate(requests, sampling)
    paths = HFEngine(model, max_batch=16).generate(requests, sampling)
    assert_same_tokens(rarely, paths)
    assert [p.finish for p in rarely] == [p.finish for p in paths]
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(RuntimeError, match="at decode step 0"):
        HFEngine(model, max_batch=16, check_every=7).generate(requests, sampling)


def counted_graphs(monkeypatch):
    """Graphs that torch.compile makes from here on, run uncompiled: seconds less."""
    graphs, compiled = CompileCounterWithBackend("eager"), torch.compile

    def counting(module, *, dynamic, **_):  # the others are the compiler's
        return compiled(module, dynamic=dynamic, backend=graphs)

    monkeypatch.setattr(torch, "compile", counting)
    return graphs


def compile_layers(model):
    """As model.compile does."""
    for layer in model.model.layers:
        layer.compile(dynamic=True)


@pytest.mark.parametrize(
    ("other", "least"), [(False, 2**20), (True, 2**20), (True, 1)], ids=["one", "two", "packed"]
)
def test_a_compiled_forward_draws_the_same_paths_by_one_graph(
    monkeypatch, model, random_qwen2, other, least
):
    """Rows leave, caches grow twice, one row is left; a second model has the graph of the first."""
    graphs = counted_graphs(monkeypatch)
    torch.compiler.reset()
    calls = count_packed(monkeypatch, least=least)
    # No number of rows is a width of the model: torch.compile would take it for that constant.
    requests, sampling = some_requests(paths=7), replace(SHORT, max_new_tokens=200)
    models, longest = [model, *([random_qwen2(seed=3)] if other else [])], []
    alone = [HFEngine(taken, max_batch=64).generate(requests, sampling) for taken in models]
    for taken in models:
        compile_layers(taken)
    engine = HFEngine(model, max_batch=64)
    for taken, again in zip(models, alone, strict=True):
        engine.sample_with(taken)
        paths = engine.generate(requests, sampling)
        longest.append(max(len(path.z_ids) for path in paths))
        assert_same_tokens(paths, again)
        for path, own in zip(paths, again, strict=True):
            torch.testing.assert_close(path.logps, own.logps, atol=1e-5, rtol=0)
    assert graphs.frame_count == 1
    assert bool(calls) == (least == 1)
    assert max(longest) > ROOM  # beside prompts of 16 tokens and less: rooms have grown


def test_a_sliding_window_is_not_compiled(monkeypatch, random_qwen2):
    model = random_qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    graphs = counted_graphs(monkeypatch)
    alone = HFEngine(model, max_batch=64).generate(some_requests(), SHORT)
    compile_layers(model)
    assert_same_tokens(HFEngine(model, max_batch=64).generate(some_requests(), SHORT), alone)
    assert graphs.frame_count == 0


def test_all_weights_are_asked_for_after_a_failure_too(make_engine, random_qwen2):
    """Each may be a collective, in which other processes wait for the one that failed."""
    engine = make_engine(random_qwen2(seed=0), max_batch=64)
    named = ((name, weight.to("meta")) for name, weight in random_qwen2().named_parameters())
    with pytest.raises(NotImplementedError, match="meta tensor"):
        engine.load_weights(named)
    assert next(named, None) is None
    with pytest.raises(ValueError, match="load_weights first"):
        engine.generate(some_requests(), GREEDY)


def test_both_names_of_a_tied_weight(random_qwen2):
    model, other = random_qwen2(seed=0), random_qwen2(seed=1)
    engine = HFEngine(model, max_batch=64)
    named = dict(other.named_parameters(remove_duplicate=False))
    with pytest.raises(ValueError, match="ties them"):
        engine.load_weights((named | {"lm_head.weight": named["lm_head.weight"] + 1}).items())
    embedding = named.pop("model.embed_tokens.weight")
    engine.load_weights(named.items())
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    untied = HFEngine(random_qwen2(tie_word_embeddings=False), max_batch=64)
    with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
        untied.load_weights(other.named_parameters())


def test_a_sliding_window_that_is_passed(random_qwen2):
    """Layers that keep 16 positions only, beside full ones, over 90 tokens."""
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    model = random_qwen2(layers=3, **window)
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    requests = some_requests()
    paths = HFEngine(model, max_batch=64).generate(requests, ENDLESS)
    assert_logps_match(model, requests, paths, temperature=1.0)


def test_a_token_of_probability_zero_is_never_drawn():
    """Zero at both ends and in the middle; uniforms at both ends and around its steps."""
    p_V = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    near = [0.0, 0.25 - 1e-6, 0.25 + 1e-6, 0.75 - 1e-6, 0.75 + 1e-6, 1 - 2.0**-53]
    uniform_R = torch.tensor(near, dtype=torch.float64)
    token_R, logp_R = draw(p_V.log().expand(6, -1), uniform_R, ENDLESS)
    assert token_R.tolist() == [1, 1, 3, 3, 4, 4]
    torch.testing.assert_close(logp_R, p_V[token_R].log())


@pytest.mark.parametrize("scale", [0.0, 1.0, 80.0])
def test_draw_inverts_the_cumulative_sum(scale):
    """Against a float64 loop, 500 rows of 200 tokens; logits up to +-80 and all equal too."""
    rng = torch.Generator().manual_seed(0)
    logits_RV = (torch.rand(500, 200, generator=rng) * 2 - 1) * scale
    uniform_R = torch.rand(500, dtype=torch.float64, generator=rng)
    token_R, _ = draw(logits_RV, uniform_R, ENDLESS)
    sum_RV = logits_RV.double().softmax(-1).cumsum(-1)
    upper_R = sum_RV.gather(-1, token_R[:, None])[:, 0]
    lower_R = upper_R - logits_RV.double().softmax(-1).gather(-1, token_R[:, None])[:, 0]
    # float32 probabilities: 200 relative roundings of 6e-8 at most.
    assert ((lower_R - 2e-5 <= uniform_R) & (uniform_R <= upper_R + 2e-5)).all()


@pytest.mark.parametrize("classes", [2 * BLOCK, 2 * BLOCK + 1, BLOCK + 7])
def test_sums_by_blocks_draw_what_one_running_sum_draws(classes):
    """Bit for bit, also at uniforms on the borders of blocks, and in rows of one class."""
    rng = torch.Generator().manual_seed(0)
    logits_RV = 4 * torch.randn(40, classes, generator=rng)
    logits_RV[30:] = -torch.inf
    logits_RV[range(30, 40), torch.randint(classes, (10,), generator=rng)] = 0.0
    logits_RV[29, :BLOCK] = -torch.inf
    mass_RV = (logits_RV / ENDLESS.temperature).log_softmax(-1).exp().double().mul(2.0**52).round()
    sum_RV = mass_RV.cumsum(-1)
    uniform_R = torch.rand(40, dtype=torch.float64, generator=rng)
    uniform_R[:9] = sum_RV[:9, BLOCK - 1] / sum_RV[:9, -1]
    uniform_R[9:12], uniform_R[12:15] = 0.0, 1 - 2.0**-53
    at_R1 = (uniform_R * sum_RV[:, -1])[:, None]
    token_R, logp_R = draw(logits_RV, uniform_R, ENDLESS)
    assert torch.equal(token_R, torch.searchsorted(sum_RV, at_R1, right=True)[:, 0])
    assert (token_R[:9] - BLOCK).abs().max() < BLOCK
    assert logp_R.isfinite().all()
    assert draw(logits_RV * torch.nan, uniform_R, ENDLESS)[1].isnan().all()


# --- what engines share ---------------------------------------------------------------------------


def split(ids, finish: Finish = "stop", **changes):
    request = SampleRequest(
        question_id="q", stream="prior", index=0, prompt_ids=torch.tensor([5]), seed=0
    )
    sampling = replace(SHORT, **{"full_answer": True, **changes})
    logps = -torch.arange(len(ids)).float()
    path = split_path(request, torch.tensor(ids), logps, sampling, finish)
    assert torch.equal(path.logps, logps[: len(path.z_ids)])
    return path.z_ids.tolist(), path.answer_ids.tolist(), path.closed, path.finish


def test_the_first_close_ends_the_thought():
    open_again = 9
    nested = [7, CLOSE, open_again, 8, CLOSE, 6, EOS]
    assert split(nested) == ([7, CLOSE], [open_again, 8, CLOSE, 6, EOS], True, "stop")
    assert split([CLOSE, EOS]) == ([CLOSE], [EOS], True, "stop")
    assert split([7, 8, EOS]) == ([7, 8, EOS], [], False, "stop")
    assert split([EOS]) == ([EOS], [], False, "stop")
    assert split([7, CLOSE], finish="error") == ([7, CLOSE], [], True, "error")


def test_an_engine_with_one_limit_is_cut_to_both():
    def cut(ids, **changes):
        return split(ids, max_new_tokens=3, max_answer_tokens=2, **changes)

    assert cut([4, 5, CLOSE, 6, EOS]) == ([4, 5, CLOSE], [6, EOS], True, "stop")
    assert cut([4, CLOSE, 6, 7, 8]) == ([4, CLOSE], [6, 7], True, "length")
    assert cut([4, 5, 6, CLOSE, EOS]) == ([4, 5, 6], [], False, "length")
    assert cut([4, 5, CLOSE], full_answer=False) == ([4, 5, CLOSE], [], True, "stop")


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.booleans(), st.integers(1, 30))
def test_segments_are_a_prefix_of_what_was_drawn(ids, full_answer, limit):
    z, answer, closed, finish = split(
        ids, full_answer=full_answer, max_new_tokens=limit, max_answer_tokens=5
    )
    assert z + answer == ids[: len(z) + len(answer)]
    assert closed == (CLOSE in ids[:limit]) == (z[-1] == CLOSE)
    assert CLOSE not in z[:-1]
    assert len(z) <= limit
    assert len(answer) <= 5 * (full_answer and closed)
    if finish == "stop" and (full_answer or not closed):
        assert len(z) + len(answer) == len(ids)


def test_seeds_are_the_same_in_every_process():
    assert request_seed(0, 0, "q0", "prior", 0) == 5134053449877483398
    streams: tuple[Stream, ...] = ("prior", "posterior")
    seeds = [
        request_seed(run, step, question, stream, index)
        for run in range(3)
        for step in range(12)
        for question in ("1", "11", "a,0", "a")
        for stream in streams
        for index in range(12)
    ]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds).bit_length() == 63


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens.*at least 1"),
        ({"max_answer_tokens": 0}, "max_answer_tokens.*at least 1"),
        ({"eos_ids": (CLOSE,)}, "think_close_id 3 is also"),
    ],
)
def test_settings_are_checked_at_birth(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **change)


def test_max_batch_must_hold_a_row(model):
    with pytest.raises(ValueError, match="got 0, None"):
        HFEngine(model, max_batch=0)
    with pytest.raises(ValueError, match="got 4, 0"):
        HFEngine(model, max_batch=4, check_every=0)


def test_half_precision_forward_over_float32_weights(random_qwen2):
    """Log-probs of the autocast forward are bfloat16's, not those of the float32 weights."""
    model = random_qwen2()
    requests = [
        SampleRequest(
            question_id="q", stream="prior", index=i, prompt_ids=torch.tensor([5, 6, 7]), seed=i
        )
        for i in range(4)
    ]
    sampling = Sampling(max_new_tokens=8, think_close_id=50, eos_ids=(1,))
    exact = HFEngine(model, max_batch=4).generate(requests, sampling)
    half = HFEngine(model, max_batch=4, dtype=torch.bfloat16).generate(requests, sampling)
    gaps = [abs(float(a.logps[0] - b.logps[0])) for a, b in zip(exact, half, strict=True)]
    assert 0 < max(gaps) < 0.2
    assert next(model.parameters()).dtype == torch.float32


# --- packed weights -------------------------------------------------------------------------------


def count_packed(monkeypatch, least=1):
    """Counts the products by packed weights; from how many tokens on they are is left as it is."""
    monkeypatch.setattr(packed, "LEAST", least)
    calls, product = [], torch.ops.mkldnn._linear_pointwise

    def counted(hidden, *rest):
        calls.append(hidden.shape)
        return product(hidden, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


def test_packed_weights_draw_the_same_paths(monkeypatch, model):
    """In a row of its own too, and behind a bias (Qwen2's attention has some)."""
    alone = HFEngine(model, max_batch=64).generate(some_requests(), SHORT)
    calls = count_packed(monkeypatch)
    paths = HFEngine(model, max_batch=64).generate(some_requests(), SHORT)
    assert_same_tokens(paths, alone)
    for path, own in zip(paths, alone, strict=True):
        torch.testing.assert_close(path.logps, own.logps, atol=1e-5, rtol=0)
    longest = max(len(tokens_of(path)) for path in paths)
    linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
    # The last token of a path is drawn from the logits before it.
    assert len(calls) >= len(linears) * longest > 0
    assert {shape[0] for shape in calls} >= {4, 12}


def test_only_large_float32_products_of_long_paths_are_packed(monkeypatch, model, random_qwen2):
    head = model.lm_head.weight.numel()
    calls = count_packed(monkeypatch, least=head)
    requests, few = some_requests(), replace(SHORT, max_new_tokens=PACK_FROM - 1)
    large = [m for m in model.modules() if type(m) is torch.nn.Linear and m.weight.numel() >= head]
    HFEngine(model, max_batch=64).generate(requests, replace(few, max_new_tokens=PACK_FROM))
    assert len(calls) == len(large) * PACK_FROM
    # A forward of its own computes otherwise: it is called as it is, and stays.
    own = lambda hidden: torch.nn.functional.linear(hidden, model.lm_head.weight)  # noqa: E731
    model.lm_head.forward = own
    calls.clear()
    HFEngine(model, max_batch=64).generate(requests, replace(few, max_new_tokens=PACK_FROM))
    assert len(calls) == (len(large) - 1) * PACK_FROM
    assert model.lm_head.forward is own
    del model.lm_head.forward
    calls.clear()
    HFEngine(model, max_batch=64).generate(requests, few)
    HFEngine(model, max_batch=64, dtype=torch.bfloat16).generate(requests, SHORT)
    HFEngine(random_qwen2(dtype=torch.float64), max_batch=64).generate(requests, SHORT)
    assert not calls


def test_packed_weights_are_those_of_each_draw_and_leave_nothing(monkeypatch, model, random_qwen2):
    """An update between two draws is drawn from; after an error, too, and a stream that is left."""
    calls = count_packed(monkeypatch)
    engine = HFEngine(model, max_batch=64)
    engine.generate(some_requests(), SHORT)
    other = random_qwen2(seed=3)
    with torch.no_grad():
        for weight, new in zip(model.parameters(), other.parameters(), strict=True):
            weight.copy_(new)
    assert_equal_paths(
        engine.generate(some_requests(), SHORT),
        HFEngine(other, max_batch=64).generate(some_requests(), SHORT),
    )
    stream = engine.stream(some_requests(), SHORT)
    next(stream)
    assert "forward" in vars(model.lm_head)
    assert packed._COPIES
    stream.close()
    assert_unpacked(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    # Its traceback is held here, and with it the frames of the draw.
    with pytest.raises(RuntimeError, match="decode step") as _held:
        engine.generate(some_requests(), SHORT)
    assert_unpacked(model)
    assert calls


@pytest.mark.parametrize("last", [0, 1], ids=["in turn", "the other way"])
def test_streams_of_one_model_end_in_any_order(monkeypatch, model, last):
    """None takes from the other its packed weights, or turns autograd on for it."""
    count_packed(monkeypatch)
    engines, requests = [HFEngine(model, max_batch=64) for _ in range(2)], some_requests()
    alone = engines[0].generate(requests, SHORT)
    streams, drawn = [engine.stream(requests, SHORT) for engine in engines], [{}, {}]
    for found, stream in zip(drawn, streams, strict=True):
        found.update(next(stream))
    for number in (1 - last, last):
        assert torch.is_grad_enabled()
        for ended in streams[number]:
            drawn[number].update(ended)
    for found in drawn:
        assert_equal_paths([found[place] for place in range(len(requests))], alone)
    assert_unpacked(model)


def assert_unpacked(*models):
    assert not any("forward" in vars(module) for model in models for module in model.modules())
    assert not packed._COPIES
    assert not packed._DRAWS


def assert_multiplies(layer, weight, hidden):
    with torch.no_grad():
        wanted = (hidden.double() @ weight.double().T).float()
        torch.testing.assert_close(layer(hidden), wanted, atol=1e-5, rtol=0)


def linear(weight):
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight = torch.nn.Parameter(weight)
    return layer


@pytest.fixture
def hidden():
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weight():
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(1))


def test_weights_at_one_address_have_copies_of_their_own(monkeypatch, hidden, weight):
    calls = count_packed(monkeypatch)
    layers = [linear(part) for part in (weight, weight.T, weight[:32], weight[:48])]
    assert len({layer.weight.data_ptr() for layer in layers}) == 1
    with packed.packed(torch.nn.ModuleList(layers)):
        for layer in layers:
            assert_multiplies(layer, layer.weight.detach(), hidden)
    assert len(calls) == 4
    assert_unpacked(*layers)


@pytest.mark.parametrize("same", [True, False], ids=["one model", "two models of one weight"])
@pytest.mark.parametrize("first", [0, 1], ids=["first", "last"])
def test_draws_that_share_a_weight_end_in_any_order(monkeypatch, hidden, weight, same, first):
    calls = count_packed(monkeypatch)
    one = linear(weight)
    models = [one, one if same else linear(weight)]
    draws = [packed.packed(model) for model in models]
    for draw_ in draws:
        draw_.__enter__()
    assert_multiplies(models[first], weight, hidden)
    draws.pop(first).__exit__(None, None, None)
    left = models[1 - first]
    assert_multiplies(left, weight, hidden)
    assert len(calls) == 2
    draws.pop().__exit__(None, None, None)
    assert_unpacked(*models)


def _new(layer, new):
    layer.weight = torch.nn.Parameter(new)


def _swap(layer, new):
    layer.weight.data = new


@torch.no_grad()
def _write(layer, new):
    layer.weight.copy_(new)


@pytest.mark.parametrize("change", [_new, _swap, _write])
def test_a_weight_that_changes_inside_is_multiplied_by(monkeypatch, hidden, weight, change):
    count_packed(monkeypatch)
    layer, new = linear(weight.clone()), weight.flip(0) + 1
    with packed.packed(layer):
        assert_multiplies(layer, weight, hidden)
        change(layer, new)
        assert_multiplies(layer, new, hidden)
    assert_unpacked(layer)


def test_a_draw_never_takes_the_copy_of_one_that_was_left_open(monkeypatch, hidden, weight):
    """Nor does what changes a weight in the forward before it, as PEFT does that takes a merged
    adapter out: both write to `.data`."""
    calls = count_packed(monkeypatch)
    layer = linear(weight.clone())
    with packed.packed(layer):
        assert_multiplies(layer, weight, hidden)
        layer.weight.data += 1
        with packed.packed(layer):
            layer.weight.data += 1
            assert_multiplies(layer, weight + 2, hidden)
    assert len(calls) == 2
    assert_unpacked(layer)


def test_a_forward_under_autograd_inside_a_draw_has_its_gradient(monkeypatch, hidden, weight):
    calls = count_packed(monkeypatch)
    layer = linear(weight)
    with packed.packed(layer), torch.enable_grad():
        layer(hidden).sum().backward()
    assert torch.equal(layer.weight.grad, hidden.sum(0).expand(64, 64))
    assert not calls


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_model_taken_inside_a_draw_works(monkeypatch, hidden, weight, again):
    count_packed(monkeypatch)
    model = torch.nn.Sequential(linear(weight))
    with packed.packed(model):
        other = again(model)
        assert_multiplies(other, weight, hidden)
    assert_multiplies(other, weight, hidden)


def test_nothing_is_packed_where_onednn_is_turned_off(monkeypatch, weight):
    count_packed(monkeypatch)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with packed.packed(layer := linear(weight)):
        assert_unpacked(layer)


# --- a closing tag of several tokens --------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_a_tag_of_several_tokens_ends_a_thought_where_its_text_does(make_engine, model, tag, full):
    """Cut exactly there by both engines, of the tokens that the path has without the tag."""
    limits = {
        "max_new_tokens": 24,
        "eos_ids": (EOS, 20, 30),
        "full_answer": full,
        "max_answer_tokens": 7,
    }
    free = Sampling(60, think_close_id=1000, eos_ids=())
    closing = Sampling(think_close_id=-1, tag=tag, **limits)
    requests = some_requests(paths=32)
    engine = make_engine(model, max_batch=64)
    found = collections.Counter()
    paths, others = engine.generate(requests, closing), engine.generate(requests, free)
    for path, whole in zip(paths, others, strict=True):
        thought, end, closed = cut_by_hand(whole, tag, closing)
        assert path.z_ids.tolist() == whole.z_ids[:thought].tolist()
        assert path.answer_ids.tolist() == whole.z_ids[thought:end].tolist()
        assert path.closed == closed
        stopped = tokens_of(path)[-1] in closing.eos_ids or (closed and not full)
        assert path.finish == ("stop" if stopped else "length")
        torch.testing.assert_close(path.response_logps, whole.logps[:end], rtol=0, atol=1e-4)
        found[closed, path.finish] += 1
    assert found[True, "stop"] > 5
    assert found[False, "length"] + found[False, "stop"] > 5
    if full:
        assert found[True, "length"] > 5
    again = engine.generate(requests[::-1], closing)[::-1]
    assert_same_tokens(again, paths)


@pytest.mark.parametrize("every", [1, 2, 5, 16, 1000])
@pytest.mark.parametrize("full", [False, True])
def test_where_a_tag_ends_does_not_hang_on_when_it_is_looked_for(model, tag, full, every):
    closing = Sampling(
        20, think_close_id=-1, eos_ids=(EOS, 20), tag=tag, full_answer=full, max_answer_tokens=3
    )
    free, requests = Sampling(40, think_close_id=1000, eos_ids=()), some_requests(paths=12)
    engine = HFEngine(model, max_batch=16, check_every=every)
    drawn = engine.generate(requests, closing)
    for path, whole in zip(drawn, engine.generate(requests, free), strict=True):
        thought, end, closed = cut_by_hand(whole, tag, closing)
        assert (path.z_ids.numel(), len(tokens_of(path)), path.closed) == (thought, end, closed)
        assert tokens_of(path) == tuple(whole.z_ids[:end].tolist())


def test_a_tag_stops_the_engine_at_its_token(model, tag, monkeypatch):
    """With a look at every step nothing is drawn behind the thought."""
    kept, split = [], HFEngine._as_path
    monkeypatch.setattr(
        HFEngine, "_as_path", lambda *args: kept.append(len(args[2].ids)) or split(*args)
    )
    closing = Sampling(24, think_close_id=-1, eos_ids=(EOS,), tag=tag)
    paths = HFEngine(model, max_batch=64, check_every=1).generate(some_requests(paths=8), closing)
    assert sorted(kept) == sorted(path.z_ids.numel() for path in paths)
    assert any(path.closed for path in paths)


def test_a_tag_goes_with_no_closing_token(tag):
    with pytest.raises(ValueError, match=r"think_close_id: got 3 beside the tag '/>'; give -1"):
        Sampling(8, think_close_id=3, eos_ids=(), tag=tag)
    sampling = Sampling(8, think_close_id=-1, eos_ids=(EOS,), tag=tag)
    assert sampling.stop_ids == (EOS,)
    assert answer_only(sampling, 1.0).tag is None
