"""The drop-in losses for sentence-transformers equal the host's own, and what they add is what a loop computes."""

import copy
import multiprocessing
import os
import sys

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("sentence_transformers", minversion="6.2")

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import losses as host  # noqa: E402
from sentence_transformers.sentence_transformer.modules import BoW, Dense, Pooling, Transformer  # noqa: E402
from sentence_transformers.util import dot_score, manhattan_sim  # noqa: E402

from karma_fast.integrations.sentence_transformers import (  # noqa: E402
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

WORDS = ["red", "blue", "steel", "small", "pan", "pot", "knife", "spoon", "lid"]
TEXTS = [["red pan", "a blue pot", "steel knife", "lid", "small red spoon", "blue lid", "pot"],
         ["pan", "pot blue", "knife", "small lid", "spoon red", "lid of steel", "a small pot"],
         ["knife", "lid", "red red pot", "pan", "blue", "small steel small spoon", "knife"],
         ["steel", "red pot", "lid", "spoon lid", "pan", "knife", "red"],
         ["pan lid", "red", "small", "blue pot pot", "steel pan", "pot", "spoon"]]
PAIR, TRIPLET, MANY = TEXTS[:2], TEXTS[:3], TEXTS
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
AMONG_QUERIES = {"directions": ("query_to_doc", "query_to_query")}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A BERT of width 16 with dropout, and a tokenizer of nine words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    vocab = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                            sep_token="[SEP]").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=16, initializer_range=0.3,
                         hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16)], device="cpu").eval()


def tokenized(model, texts):
    return [model.preprocess(column) for column in texts]


def value_and_grads(loss_fn, columns, labels=None, factor=1.0):
    loss_fn.zero_grad()
    loss = loss_fn(columns, labels)
    (loss * factor).backward()
    return loss.detach(), {name: p.grad for name, p in loss_fn.model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert set(ours[1]) == set(theirs[1]) and len(ours[1]) > 30
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("texts, options", [
    (PAIR, {}), (TRIPLET, {}), (MANY, {}), (MANY, {"scale": 7.0}),
    (PAIR, {"similarity_fct": dot_score, "scale": 0.3}), (MANY, {"similarity_fct": dot_score, "scale": 1}),
    (PAIR, SYMMETRIC), (MANY, SYMMETRIC | {"similarity_fct": dot_score, "scale": 0.3}),
    (PAIR, AMONG_QUERIES), (TRIPLET, AMONG_QUERIES),
    (TRIPLET, {"hardness_mode": "all_negatives", "gather_across_devices": True}),
])
def test_values_and_gradients_are_those_of_the_host(model, texts, options, cached):
    if cached:
        ours, theirs = CachedMultipleNegativesRankingLoss, host.CachedMultipleNegativesRankingLoss
        options = options | {"mini_batch_size": 3}
    else:
        ours, theirs = MultipleNegativesRankingLoss, host.MultipleNegativesRankingLoss
    model.double()
    columns = tokenized(model, texts)
    # our scale is a number in single precision: 1 and 20 are exact there, others are rounded
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if options.get("scale", 20) in (1, 20) else {"rtol": 1e-6, "atol": 1e-7}
    assert_same(value_and_grads(ours(model, **options), columns, torch.ones(7)),
                value_and_grads(theirs(model, **options), columns), **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(ours(model, **options)(columns), theirs(model, **options)(columns, None),
                                   **tolerance)


def test_single_precision(model):
    """Sums over all tokens are rounded differently on every machine: what counts is the size of a tensor, not of an
    entry in which they cancel."""
    columns = tokenized(model, MANY)
    expected, theirs = value_and_grads(host.MultipleNegativesRankingLoss(model), columns)
    cached = CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=8)
    for loss in (MultipleNegativesRankingLoss(model), cached):
        value, ours = value_and_grads(loss, columns)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert set(ours) == set(theirs) and len(ours) > 30
        whole = torch.stack([grad.norm() for grad in theirs.values()]).norm()
        for name, grad in theirs.items():  # a key's bias has no gradient but rounding
            assert (ours[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7 * whole, name


def test_settings(model):
    loss = CachedMultipleNegativesRankingLoss(model, 10.0, dot_score, 4, labels_are_ids=True, **SYMMETRIC)
    theirs = host.CachedMultipleNegativesRankingLoss(model, 10.0, dot_score, 4, **SYMMETRIC)
    added = {"labels_are_ids": True, "learnable_scale": False, "backend": "auto"}
    assert loss.get_config_dict() == theirs.get_config_dict() | added
    assert loss.citation == theirs.citation and loss.loss.citation == theirs.loss.citation
    assert loss.temperature == 0.1
    loss.labels_are_ids = loss.loss.labels_are_ids = False
    loss.scale = theirs.scale = 2.0  # a schedule may do this
    columns = tokenized(model, PAIR)
    torch.testing.assert_close(loss(columns), theirs(columns, None))


@pytest.mark.parametrize("make", [MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss])
@pytest.mark.parametrize("options, message", [
    ({"similarity_fct": manhattan_sim}, "got manhattan_sim; cos_sim or dot_score"),
    ({"directions": ("query_to_doc", "doc_to_doc")}, "with doc_to_query and 'per_direction', or with query_to_query"),
    ({"directions": ("query_to_doc", "doc_to_query")}, "with partition_mode 'joint'; supported are"),
    ({"hardness_mode": "hard_negatives", "hardness_strength": 5.0}, "got 'hard_negatives' with hardness_strength 5"),
    ({"scale": 0.0}, "positive"), ({"scale": 200.0, "learnable_scale": True}, "max_scale 100"),
    ({"directions": ("sideways", "query_to_doc")}, "sideways"),
])
def test_refused_settings(model, make, options, message):
    with pytest.raises(ValueError, match=message):
        make(model, **options)


def loss_by_hand(embeddings, ids, scale=20.0):
    """ids: per candidate column a list of ids, None where a candidate has none."""
    anchors, *columns = [torch.nn.functional.normalize(e) for e in embeddings]
    total = 0.0
    for i, anchor in enumerate(anchors):
        kept = [column[j] for c, column in enumerate(columns) for j in range(len(column))
                if (c == 0 and j == i) or ids[c][j] is None or ids[c][j] != ids[0][i]]
        total -= scale * anchor @ columns[0][i] - (scale * torch.stack(kept) @ anchor).logsumexp(0)
    return total / len(anchors)


@pytest.mark.parametrize("make", [MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss])
@pytest.mark.parametrize("labels", [
    torch.tensor([5, 6, 5, -7, 6, 5, 8]),
    torch.tensor([[5, 6], [6, 9], [5, 5], [7, 9], [6, 5], [5, 9], [8, 7]], dtype=torch.int32),
], ids=["of the positives", "of all candidates"])
def test_ids_mask_as_computed_by_hand(model, make, labels):
    columns = tokenized(model.double(), TRIPLET)
    ids = labels.T.tolist() if labels.ndim == 2 else [labels.tolist(), [None] * 7]
    loss = make(model, labels_are_ids=True)
    ours = value_and_grads(loss, columns, labels)
    plain = value_and_grads(make(model), columns, labels)
    expected = loss_by_hand([model(column)["sentence_embedding"] for column in columns], ids)
    model.zero_grad()
    expected.backward()
    assert_same(ours, (expected.detach(), {name: p.grad for name, p in model.named_parameters()
                                           if p.grad is not None}), rtol=1e-6, atol=1e-9)
    assert plain[0] > ours[0] * 1.01  # without the option the same column changes nothing
    torch.testing.assert_close(plain[0], loss_by_hand([model(c)["sentence_embedding"] for c in columns],
                                                      [range(7), [None] * 7]).detach())


def test_ids_with_the_other_anchors_as_candidates(model):
    """An anchor counts as its positive: it is dropped where that would be."""
    columns = tokenized(model.double(), PAIR)
    labels = torch.tensor([5, 6, 5, 7, 6, 5, 8])
    loss = MultipleNegativesRankingLoss(model, labels_are_ids=True, **AMONG_QUERIES)(columns, labels)
    anchors, positives = (model(column)["sentence_embedding"] for column in columns)
    torch.testing.assert_close(loss, loss_by_hand([anchors, positives, anchors], [labels.tolist()] * 2))


@pytest.mark.parametrize("labels, error, message", [
    (None, ValueError, "integer column named 'label'"), (torch.ones(7), TypeError, "torch.float32; integers"),
    (torch.ones(7, 3, dtype=torch.int64), ValueError, r"got labels of shape \(7, 3\); \(7,\).*or \(7, 2\)"),
])
def test_wrong_ids(model, labels, error, message):
    with pytest.raises(error, match=message):
        MultipleNegativesRankingLoss(model, labels_are_ids=True)(tokenized(model, TRIPLET), labels)


def test_one_column_is_refused(model):
    for make in MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss:
        with pytest.raises(ValueError, match="1"):
            make(model)(tokenized(model, TEXTS[:1]), None)


@pytest.mark.parametrize("autocast", [False, True])
def test_cached_repeats_dropout_and_autocast(model, autocast):
    model.train()
    if not autocast:
        model.double()
    loss_fn = CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)  # 3, 3, 1
    columns = tokenized(model, TRIPLET)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_fn(columns)
    torch.rand(3)  # another user of the generator between the passes
    dtypes = set()
    layer = model[0].auto_model.encoder.layer[0].attention.self.query
    layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    before = torch.get_rng_state()
    loss.backward()  # outside the context, as it should be called
    assert torch.equal(torch.get_rng_state(), before)
    assert dtypes == {torch.bfloat16 if autocast else torch.float64}
    cached = loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # the same mini-batches, kept in the graph
        reps = [[rep for rep, _ in loss_fn.embed_minibatch_iter(column, True, False)] for column in columns]
        kept = loss_fn.loss.compute_loss_from_embeddings([torch.cat(column) for column in reps])
        other = loss_fn.loss.compute_loss_from_embeddings([model(c)["sentence_embedding"] for c in columns])
    kept.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if autocast:  # the graph adds up the gradients of its half-precision copies of the weights, cached does not
        assert cached[0] == kept
        error, size = (sum((cached[1][name] * with_cached - grad).square().sum() for name, grad in grads.items())
                       for with_cached in (1, 0))
        assert error < 1e-4 * size
    else:
        assert_same(cached, (kept.detach(), grads), rtol=1e-9, atol=1e-10)
    assert (other - kept).abs() > 1e-3  # other draws, another loss


@pytest.mark.parametrize("make", [MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss])
def test_learnable_scale(model, make):
    columns = tokenized(model.double(), TRIPLET)
    loss_fn = make(model, scale=20.0, learnable_scale=True)
    (name, log_scale), = [(n, p) for n, p in loss_fn.named_parameters() if n.endswith("log_scale")]
    assert_same(value_and_grads(loss_fn, columns, factor=0.5),
                value_and_grads(host.MultipleNegativesRankingLoss(model), columns, factor=0.5), rtol=1e-6, atol=1e-9)
    (loss_fn(columns) * 0.25).backward()  # accumulates; the factors 0.5 and 0.25 come from outside
    with torch.no_grad():
        up, down = (host.MultipleNegativesRankingLoss(model, 20 + d)(columns, None) for d in (1e-3, -1e-3))
    torch.testing.assert_close(log_scale.grad.double(), (up - down) / 2e-3 * 20 * 0.75, rtol=1e-4, atol=0)
    with torch.no_grad():
        log_scale.fill_(9.0)
    loss_fn(columns)
    assert round(log_scale.exp().item(), 3) == 100  # the limit
    assert name in dict(loss_fn.named_parameters())


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_trainer_makes_the_same_steps(model, tmp_path, cached):
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    dataset = datasets.Dataset.from_dict({"anchor": TEXTS[0], "positive": TEXTS[1], "negative": TEXTS[2],
                                          "label": [[5, 6], [6, 5], [5, 6], [6, 5], [5, 6], [6, 5], [5, 6]]})
    name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    start, ends = copy.deepcopy(model.state_dict()), []
    for module, options in ((host, {}), (sys.modules[MultipleNegativesRankingLoss.__module__], {}),
                            (sys.modules[MultipleNegativesRankingLoss.__module__], {"labels_are_ids": True})):
        model.load_state_dict(start)
        loss = getattr(module, name)(model, **options, **({"mini_batch_size": 2} if cached else {}))
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=2,
            learning_rate=0.1, optim="sgd", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            seed=3)
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=dataset, loss=loss)
        trainer.train()
        ends.append(copy.deepcopy(model.state_dict()))
    theirs, ours, with_ids = ends
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    key = "0.model.encoder.layer.1.output.dense.weight"
    assert (theirs[key] - start[key]).abs().max() > 1e-3
    assert (with_ids[key] - ours[key]).abs().max() > 1e-4  # the label column arrived
    model.save(str(tmp_path / "saved"))
    assert '"labels_are_ids": true' in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


def bag_of_words():
    torch.manual_seed(0)
    return SentenceTransformer(modules=[BoW(WORDS), Dense(len(WORDS), 6)], device="cpu").double()


GATHERED = [(MultipleNegativesRankingLoss, {}), (CachedMultipleNegativesRankingLoss, {"mini_batch_size": 2}),
            (MultipleNegativesRankingLoss, SYMMETRIC | {"labels_are_ids": True}),
            (CachedMultipleNegativesRankingLoss, AMONG_QUERIES | {"learnable_scale": True}),
            (MultipleNegativesRankingLoss, AMONG_QUERIES | {"labels_are_ids": True, "learnable_scale": True})]
IDS = torch.tensor([5, 6, 5, 7, 6, 5, 8])


def gathered_results(rank, processes, rendezvous):
    """[(loss, gradients)] of GATHERED with rows 0..3 on process 0 and the rest on 1, averaged as DDP does it."""
    torch.set_num_threads(1)
    rows, results = [slice(0, 4), slice(4, 7)][rank] if processes > 1 else slice(0, 7), []
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    for make, options in [*GATHERED, (host.MultipleNegativesRankingLoss, {})]:
        model = bag_of_words()
        if make is host.MultipleNegativesRankingLoss:  # which needs batches of one size
            rows = slice(3 * rank, 3 * rank + 3) if processes > 1 else slice(0, 6)
        loss_fn = make(model, gather_across_devices=True, **options)
        columns = [{name: x.double() for name, x in model.preprocess(texts[rows]).items()} for texts in TRIPLET]
        loss = loss_fn(columns, IDS[rows])
        loss.backward()
        values = [loss.detach()] + [p.grad for p in model.parameters()]
        for value in values if processes > 1 else []:
            dist.all_reduce(value)
            value /= processes
        results.append(values + [p.grad for name, p in loss_fn.named_parameters() if name.endswith("log_scale")])
    if processes > 1:
        dist.destroy_process_group()
    return results


def test_two_processes_are_one(tmp_path, monkeypatch):
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context.set_forkserver_preload(["karma_fast.integrations.sentence_transformers"])  # imported once
    with context.Pool(2) as pool:
        both = pool.starmap_async(gathered_results, [(rank, 2, tmp_path / "rendezvous") for rank in (0, 1)],
                                  chunksize=1).get(timeout=120)
    one = gathered_results(0, 1, None)
    assert [len(values) for values in one] == [3, 3, 3, 4, 4, 3]
    torch.testing.assert_close(both[0], one, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(both[0], both[1])
