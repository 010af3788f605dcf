"""The report of a run: what it says, that it survives broken runs, and that nothing in a title can break the page."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karma_fast.evaluation.attention import NoAttention, attention_map
from karma_fast.evaluation.charts import columns, heat_map, line_chart, sparkline, text_heat_map, tick_labels, ticks
from karma_fast.evaluation.page import Section, Table, to_markdown
from karma_fast.evaluation.report import write_report
from karma_fast.evaluation.verdict import standard_error, verdict
from karma_fast.model.backbone import adapters_off, causal_lm
from karma_fast.model.karma import KarmaModel
from karma_fast.run import examples_of

NASTY = '<script>alert("x")</script> & \'quotes\' | *stars* [link](x) `code`'
TITLES = [
    "Toy Story", "GoldenEye", "Four Rooms", "Get Shorty", "Twelve Monkeys", "Dead Man Walking", "Seven", "Babe",
    "Mighty Aphrodite", "Postino, Il", "French Twist (Gazon maudit)", "From Dusk Till Dawn", "White Balloon, The",
    "Antonia's Line", "Angels and Insects", "Rumble in the Bronx", "Birdcage, The", "Brothers McMullen, The"]


def synthetic_run(folder, steps=340, seed=0):
    """A realistic run folder, made from a seed alone."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)

    def noise(scale):
        return float(random.normal(0, scale))

    lines = []
    for step in range(10, steps + 1, 10):
        done = step / steps
        line = {"step": step, "epoch": done, "loss": 6.2 - 2.1 * done + noise(0.1), "grad_norm": 1.4 + noise(0.2),
                "learning_rate": 3e-4 * (1 - done), "act": 5.6 - 1.5 * (1 - math.exp(-4 * done)) + noise(0.06),
                "gen": 3.1 - 1.2 * (1 - math.exp(-5 * done)) + noise(0.08),
                "rec": 4.4 - 1.9 * (1 - math.exp(-3 * done)) + noise(0.1), "vis": 1.1 - 0.4 * done + noise(0.02),
                "scale": 14.3 + 6 * done, "tokens_per_second": 3420 + noise(90),
                "peak_memory_bytes": int(1.92e9 + 2e8 * done),
                "share_u/act": 0.80 - 0.1 * done + noise(0.02), "share_u/rec": 0.15 + 0.1 * done + noise(0.02),
                "share_u/vis": 0.05 + noise(0.005)}
        if step % 50 == 0:
            line |= {"share_llm/act": 0.6 + noise(0.03), "share_llm/gen": 0.3 + noise(0.03), "share_llm/rec": 0.1}
        lines.append(line)
        if step % 60 == 0:
            found = {"HR@1": 0.02, "HR@10": 0.07 + 0.06 * done + noise(0.004), "HR@50": 0.25 + 0.1 * done,
                     "NDCG@10": 0.035 + 0.03 * done, "MRR": 0.04 + 0.02 * done + noise(0.002)}
            lines.append({"step": step, "epoch": done} | {f"eval_{name}": value for name, value in found.items()})
    lines.append({"step": steps, "train_runtime": 301.2, "train_loss": 4.9})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def row(*values):
        names = ("HR@1", "HR@5", "HR@10", "HR@50", "HR@200", "NDCG@10", "MRR", "AUC", "tie_share", "NDCG@1")
        return dict(zip(names, values, strict=True))

    metrics = {"rows": {
        "popularity": row(0.0095, 0.0339, 0.0541, 0.1909, 0.4899, 0.0273, 0.0284, 0.8113, 0.4, 0.0095),
        "item_knn": row(0.0201, 0.0668, 0.1166, 0.3446, 0.6818, 0.0582, 0.0529, 0.8890, 0.0, 0.0201),
        "title_tfidf": row(0.0032, 0.0106, 0.0191, 0.0753, 0.2386, 0.0096, 0.0111, 0.5842, 0.5, 0.0032),
        "karma_start": row(0.0095, 0.0435, 0.0817, 0.2556, 0.5556, 0.0395, 0.0380, 0.8500, 0.0, 0.0095),
        "karma": row(0.0223, 0.0774, 0.1304, 0.3796, 0.7211, 0.0667, 0.0591, 0.9012, 0.0, 0.0223)},
        "protocol": "MovieLens-100K: 943 requests ranked against all 1,682 items, seen items left out, ties count "
                    "half, the model reads the last 20 items; leave one out: last event test, last but one "
                    "validation; equal timestamps shuffled with seed 0",
        "seconds": 512.4, "stage_seconds": {"data": 4.2, "model": 38.1, "baselines": 2.0, "start": 22.0,
                                            "training": 301.2, "evaluation": 88.0, "saving": 1.4},
        "peak_rss_bytes": 2_310_000_000, "seed": 0, "command": "karma-fast demo --data.name MovieLens-100K",
        "versions": {"python": "3.11.7", "karma-fast": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "device": "CPU, 2 cores, AVX-512",
        "decoding": {"matched_loss": 2.412, "shuffled_loss": 2.871, "mean_loss": 2.655, "users": 200,
                     "share_better": 0.87}}
    (folder / "metrics.json").write_text(json.dumps(metrics))

    def example(user, target, hit):
        top = [str(t) for t in random.choice(TITLES, 5, replace=False) if t != target][:4]
        top.insert(2 if hit else 4, target if hit else "Fargo")
        return {"user": str(user), "history": [str(t) for t in random.choice(TITLES, 16, replace=False)], "query": "",
                "target": f"{target} | 1995 | Drama Thriller", "target_rank": 3 if hit else 118,
                "top": [{"title": t, "score": 0.71 - 0.04 * n} for n, t in enumerate(top)],
                "decoded": f"{target[:6]} | 1995 | Drama"}

    examples = [example(196, "Seven", True), example(22, "Toy Story", False), example(7, "Babe", True)]
    examples[2] |= {"query": NASTY,
                    "history": [NASTY, "Supercalifragilistic" * 6, "ابن القرصان (1999)", "千と千尋の神隠し"]}
    examples[2]["top"][0]["title"] = NASTY
    (folder / "examples.json").write_text(json.dumps(examples))

    labels = ["The", "user", "chose", ",", "oldest", "first", ":", *TITLES[:16], "חלום מתוק", NASTY[:24], "[EMB]"]
    size = len(labels)

    def attention(stripes):
        logits = random.normal(0, 0.7, (size, size)) - 0.08 * np.subtract.outer(np.arange(size), np.arange(size))
        logits[:, 0] += 3.5
        logits[:, stripes] += 2.2
        weights = np.where(np.tril(np.ones((size, size))) > 0, np.exp(logits), 0)
        return (weights / weights.sum(axis=1, keepdims=True)).round(5).tolist()

    (folder / "attention.json").write_text(json.dumps(
        {"labels": labels, "before": attention([]), "after": attention([9, 13]), "user": "196",
         "note": "30 layers, 9 heads."}))
    (folder / "config.yaml").write_text(
        "data:\n  interactions: ml-100k.inter\n  items: ml-100k.item\n  name: MovieLens-100K\n  seed: 0\n"
        "model:\n  backbone: smollm2-135m-instruct\n  quantization: 4bit\n  tuning: lora\n  lora_rank: 16\n"
        "  embedding_dim: 256\n  positions: all\n  max_history: 20\n  max_text_tokens: 24\n"
        "  instruction: 'The user chose, oldest first:'\n  act_weight: 1.0\n  decode_weight: 0.1\n  gen_weight: 1.0\n"
        "  rec_weight: 1.0\n  vis_weight: 1.0\ntraining:\n  learning_rate: 0.0003\n  projection_learning_rate: 0.001\n"
        "  per_device_train_batch_size: 32\n  num_train_epochs: 1.0\n  logging_steps: 10\n")
    return folder


@pytest.fixture
def run(tmp_path):
    return synthetic_run(tmp_path / "demo")


def change(folder, file, edit):
    """Rewrites a JSON file of a run with ``edit`` applied to its value."""
    value = json.loads((folder / file).read_text())
    edit(value)
    (folder / file).write_text(json.dumps(value))


def texts(folder):
    html, markdown = write_report(folder)
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps them with their attributes and the text outside of style."""

    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def headings(markdown):
    return re.findall(r"^## (.*)$", markdown, re.M)


ALL = ["Metrics", "Validation during training", "Loss parts", "Scale, speed and memory", "Gradient shares",
       "Decoded examples", "Does the embedding know its own item?", "Attention", "Where the time went",
       "Settings and versions"]


def test_all_sections_in_both_forms_in_one_order(run):
    html, markdown = texts(run)
    page = Page(html)
    assert headings(markdown) == ALL
    assert re.findall(r"<h2><bdi>(.*?)</bdi></h2>", html) == ALL
    text = " ".join("".join(page.text).split())
    for said in ("HR@10 0.1304 against 0.1166 (1.12×)", "943 requests ranked against all 1,682 items",
                 "0.459 nats per token", "the mean of all embeddings", "2.655",
                 "87% of 200 users", "5 min 1 s", "karma-fast demo --data.name MovieLens-100K",
                 "torch 2.13.0", "lora_rank: 16"):
        assert said in text and said in " ".join(markdown.split()), said
    # the protocol stands directly under the table
    assert re.search(r"</table></div>\s*<p class=\"note\">Protocol: MovieLens-100K", html)


def test_the_page_needs_no_network_and_no_script_and_fits_a_phone(run):
    html, _ = texts(run)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {name for name, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=|\bon[a-z]+=", html)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    assert len(html) < 100_000


def test_nothing_in_a_title_is_read_as_a_tag(run):
    change(run, "metrics.json", lambda m: m.update(
        protocol=NASTY, command=NASTY, device=NASTY, versions={NASTY: NASTY}, stage_seconds={NASTY: 1.0}))
    change(run, "metrics.json", lambda m: m["rows"].update({NASTY: {"HR@10": 0.01}}))
    change(run, "attention.json", lambda a: a.update(user=NASTY, note=NASTY, labels=[NASTY] * len(a["labels"])))
    for n in range(3):
        change(run, "examples.json", lambda e, n=n: e[n].update(user=NASTY, target=NASTY, decoded=NASTY, query=NASTY))
    (run / "config.yaml").write_text(f"name: {NASTY}\n```\n# not a heading\n")
    html, markdown = texts(run)
    page = Page(html)
    assert not page.all("script") and html.count("<script") == 0
    assert "".join(page.text).count(NASTY) >= 10  # shown as it was given
    fenced = re.sub(r"^(`{3,})text$.*?^\1$", "", markdown, flags=re.M | re.S)
    assert "not a heading" not in fenced and not re.search(r"(?<!\\)<script", fenced)
    assert not re.search(r"(?<!\\)\[link\]", fenced)


def test_directions_and_broken_characters_stay_inside_their_title(run):
    bad = "abc\u202egnp\x00\x1b[31m\ud800 ابن"
    change(run, "examples.json", lambda e: e[0].update(target=bad, history=[bad]))
    html, markdown = texts(run)
    for text in (html, markdown):
        assert not re.search("[\u202a-\u202e\x00\x1b]", text)
    assert "<bdi>abcgnp[31m\ufffd ابن</bdi>" in html


def test_the_target_is_marked_once_where_it_is_hit(run):
    html, markdown = texts(run)
    assert html.count(" <em>target</em>") == markdown.count("**← target**") == 2
    assert re.search(r"3\. Seven \(0\.630\) \*\*← target\*\*", markdown)
    change(run, "examples.json", lambda e: e[0]["top"].append({"title": "Seven", "score": 0.1}))
    assert texts(run)[1].count("**← target**") == 2


def test_terms_that_share_a_prefix_with_the_target_are_no_hit(run):
    change(run, "examples.json", lambda e: e[0].update(target="Seven Years in Tibet | 1997"))
    assert texts(run)[1].count("**← target**") == 1


def test_of_two_items_with_one_title_the_target_is_marked(run, tiny_data):
    items = dataclasses.replace(tiny_data.items, titles=["Same"] * len(tiny_data.items))
    data, last = dataclasses.replace(tiny_data, items=items), int(tiny_data.sequences.indptr[1]) - 1
    vectors = torch.nn.functional.normalize(torch.randn(len(items), 8, generator=torch.manual_seed(0)), dim=-1)
    target = int(tiny_data.sequences.items[last])
    model = SimpleNamespace(encode_items=lambda: vectors, decode_projection=None,
                            config=SimpleNamespace(max_history=5))
    example, = examples_of(model, data, np.array([last]), vectors[[target]] + vectors[[(target + 1) % len(items)]])
    assert [entry["hit"] for entry in example["top"]].count(True) == 1
    example["top"] = sorted(example["top"], key=lambda entry: entry["hit"])  # the target is the last one
    (run / "examples.json").write_text(json.dumps([example]))
    assert re.findall(r"(\d)\. Same .* \*\*← target\*\*", texts(run)[1]) == ["5"]


@pytest.mark.parametrize("missing", ["metrics.json", "log.jsonl", "examples.json", "attention.json", "config.yaml"])
def test_a_missing_file_leaves_out_its_sections_alone(run, missing):
    (run / missing).unlink()
    html, markdown = texts(run)
    gone = {"metrics.json": {"Metrics", "Does the embedding know its own item?", "Where the time went"},
            "log.jsonl": set(ALL[1:5]), "examples.json": {"Decoded examples"}, "attention.json": {"Attention"},
            "config.yaml": set()}[missing]
    assert headings(markdown) == [h for h in ALL if h not in gone]
    Page(html)


@pytest.mark.parametrize("name", ["requests", "seconds", "peak_rss_bytes", "stage_seconds", "decoding"])
def test_an_infinite_number_leaves_its_own_place_empty(run, name):
    def edit(metrics):
        if isinstance(metrics.get(name), dict):
            metrics[name] = dict.fromkeys(metrics[name], math.inf)
        else:
            metrics[name] = math.inf

    change(run, "metrics.json", edit)
    _, markdown = texts(run)
    assert "HR@10 0.1304 against 0.1166" in markdown and "943 requests" in markdown
    assert not re.search(r"\b(inf|nan)\b", markdown)


@pytest.mark.parametrize(("found", "said"), [
    ({"matched_loss": 2.466, "shuffled_loss": 2.519, "mean_loss": 2.6, "share_better": 0.63}, "Yes: "),
    ({"matched_loss": 2.466, "shuffled_loss": 2.519, "mean_loss": 2.464, "share_better": 0.63},
     "Hardly yet: the target's text costs 2.466 nats per token from the user's own embedding, 2.519 from another "
     "user's, 2.464 from the mean of all embeddings"),
    ({"matched_loss": 2.4660, "shuffled_loss": 2.4661, "mean_loss": 2.40, "share_better": 0.47}, "No evidence yet: "),
    ({"matched_loss": 2.40, "shuffled_loss": 2.45, "mean_loss": 2.5, "share_better": 0.54}, "No evidence yet: "),
    ({"matched_loss": 2.46, "shuffled_loss": 2.45, "mean_loss": 2.5, "share_better": 0.7}, "No: ")])
def test_an_embedding_knows_its_item_only_by_evidence(run, found, said):
    change(run, "metrics.json", lambda m: m.update(decoding=found | {"users": 512}))
    assert said in " ".join(texts(run)[1].split())


def test_a_log_alone_is_enough(run):
    for file in ("metrics.json", "examples.json", "attention.json", "config.yaml"):
        (run / file).unlink()
    lines = [line for line in (run / "log.jsonl").read_text().splitlines() if "eval_" not in line]
    lines = [json.dumps({k: v for k, v in json.loads(line).items() if not k.endswith("vis")}) for line in lines]
    (run / "log.jsonl").write_text("\n".join(lines))
    html, markdown = texts(run)
    assert headings(markdown) == ["Loss parts", "Scale, speed and memory", "Gradient shares"]
    assert "No final metrics" in markdown and "ends at step 340" in markdown and "L_vis" not in html


def test_nothing_to_report_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.json.*are all missing.*give the folder"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "not there")


def test_values_that_are_not_finite_leave_gaps_and_a_word(run):
    with (run / "log.jsonl").open("a") as file:
        for step, value in ((350, math.nan), (360, math.inf), (370, -math.inf), (380, 4.0)):
            file.write(json.dumps({"step": step, "act": value, "share_u/act": value, "scale": value}) + "\n")
    html, markdown = texts(run)
    numbers = re.findall(r' (?:d|x|y|cx|cy)="([^"]*)"', html)
    assert numbers and not any(re.search("nan|inf", n, re.I) for n in numbers)
    assert "3 of L_act" in markdown and "3 of L_act" in html
    # all of a term may be broken
    lines = "".join(json.dumps({"step": n, "act": math.nan, "gen": 1.0}) + "\n" for n in range(3))
    (run / "log.jsonl").write_text(lines)
    assert "L_act " not in re.search("```text(.*?)```", texts(run)[1], re.S)[1]


def test_broken_files_are_named_and_the_rest_is_reported(run):
    (run / "examples.json").write_text('[{"user": "1", "hist')
    (run / "attention.json").write_text("[]")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 350, "lo')
    html, markdown = texts(run)
    for text in (html, " ".join(markdown.replace("\n>", "").split())):
        assert "examples.json cannot be read" in text
        assert "attention.json holds a list instead of a dict" in text
        assert "log.jsonl has 1 line that cannot be read" in text
    assert "Loss parts" in headings(markdown)


def test_fields_of_the_wrong_kind_are_left_out(run):
    change(run, "metrics.json", lambda m: m.update(
        rows={"karma": {"HR@10": None, "MRR": "x", "AUC": 0.5}, "popularity": 3}, stage_seconds=[1], decoding="?",
        versions="torch 2", seed=None, seconds="9"))
    change(run, "examples.json", lambda e: e.append(3))
    change(run, "examples.json", lambda e: e[0].update(top="x", history=None, target=None, target_rank="2"))
    change(run, "attention.json", lambda a: a.update(before=[[1, 2], [3]], after=None))
    html, markdown = texts(run)
    Page(html)
    assert "No HR@10 of KARMA is recorded" in markdown
    assert not {"Attention", "Where the time went", ALL[6]} & set(headings(markdown))


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:3]):
            yield from places(inner, (*path, key))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = synthetic_run(tmp_path_factory.mktemp("whole"), steps=60)
    files = {f.name: json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))}
    return files | {"log.jsonl": [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]}


odd = st.recursive(
    st.none() | st.booleans() | st.integers(-10**400, 10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=5)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_run_with_any_field_replaced_gives_a_page(whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    for name, value in whole.items():
        value = json.loads(json.dumps(value))
        path = data.draw(st.sampled_from([p for p in places(value) if p]))
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = data.draw(odd)
        lines = map(json.dumps, value) if name == "log.jsonl" else [json.dumps(value)]
        (folder / name).write_text("\n".join(lines))
    Page(texts(folder)[0])


# ---- verdict -----------------------------------------------------------------------------------------------------


def rows(**values):
    return {name: {"HR@10": value} for name, value in values.items()}


def test_a_defeat_comes_first_and_all_of_them_are_named():
    found = rows(popularity=0.05, item_knn=0.20, title_tfidf=0.15, karma_start=0.02, karma=0.10)
    lead, rest, _ = verdict(found, 1000)
    assert lead == "KARMA loses to item-kNN: HR@10 0.1000 against 0.2000 (0.50×)."
    assert rest == ("It is also behind title TF-IDF (0.1500, 0.67×). It beats popularity (0.0500, 2.00×) and its own "
                    "start (0.0200, 5.00×).")


def test_training_that_made_it_worse_is_said_first():
    assert verdict(rows(popularity=0.05, karma_start=0.3, karma=0.1), 1000)[0].startswith(
        "KARMA loses to its own start")


def test_a_gap_within_noise_is_no_victory_and_no_defeat():
    ahead, behind = verdict(rows(popularity=0.10, karma=0.11), 900), verdict(rows(popularity=0.11, karma=0.10), 900)
    assert ahead[0].startswith("KARMA is ahead of the best baseline") and ahead[0].endswith("within noise.")
    assert behind[0].startswith("KARMA is behind popularity") and behind[0].endswith("within noise.")
    assert "0.7 standard errors" in ahead[-1] and "0.0104 for KARMA and 0.0100 for popularity" in ahead[-1]
    assert verdict(rows(popularity=0.10, karma=0.11), 90_000)[0].startswith("KARMA beats")


def test_no_other_row_is_beaten_within_noise_either():
    demo = rows(popularity=0.0817, item_knn=0.1750, title_tfidf=0.0191, karma_start=0.2354, karma=0.2365)
    lead, rest, _ = verdict(demo, 943)
    assert lead == "KARMA beats the best baseline, item-kNN: HR@10 0.2365 against 0.1750 (1.35×)."
    assert rest == ("It beats popularity (0.0817, 2.89×) and title TF-IDF (0.0191, 12×). The gap to its own start "
                    "(0.2354, 1.00×) is within noise.")
    lead, rest, _ = verdict(rows(popularity=0.2, item_knn=0.3, title_tfidf=0.101, karma_start=0.099, karma=0.1), 943)
    assert lead.startswith("KARMA loses to item-kNN")
    assert rest == ("It is also behind popularity (0.2000, 0.50×). It beats none of the others. The gaps to title "
                    "TF-IDF (0.1010, 0.99×) and its own start (0.0990, 1.01×) are within noise.")
    assert verdict(rows(popularity=0.1, item_knn=0.02, karma_start=0.2, karma=0.2), 943)[1] == (
        "It beats popularity (0.1000, 2.00×) and item-kNN (0.0200, 10×).")


def test_edges_of_the_verdict():
    assert verdict(rows(popularity=0.0, karma=0.1), 100)[0] == \
        "KARMA beats the best baseline, popularity: HR@10 0.1000 against 0.0000."
    assert verdict(rows(popularity=0.1, karma=0.1), 100)[0] == "KARMA ties with popularity at HR@10 0.1000."
    assert "nothing stands beside it" in verdict(rows(karma=0.1), 100)[0]
    assert "No HR@10 of KARMA" in verdict(rows(popularity=0.1), 100)[0]
    assert "not recorded" in verdict(rows(popularity=0.1, karma=0.2))[-1]
    assert "rough" in verdict(rows(popularity=0.01, karma=0.2), 100)[-1]
    # spellings of a baseline's name do not matter
    spelt = {"item-kNN": {"HR@10": 0.5}, "KARMA": {"HR@10": 0.1}}
    assert verdict(spelt, 10_000)[0].startswith("KARMA loses to item-kNN")


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 10**6))
def test_the_verdict_never_claims_what_the_numbers_do_not_show(own, other, requests):
    lead = verdict(rows(popularity=other, karma=own), requests)[0]
    assert ("loses" in lead or "behind" in lead) == (own < other)
    assert ("beats" in lead or "ahead" in lead) == (own > other)
    error = math.hypot(standard_error(own, requests), standard_error(other, requests))
    assert ("within noise" in lead) == (0 < abs(own - other) < 2 * error)


# ---- charts and tables -------------------------------------------------------------------------------------------


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_inside_their_range_and_their_labels_differ(low, span):
    high = low + span
    marks = ticks(low, high)
    assert len(marks) <= 11
    slack = 1e-6 * span + 1e-12 * abs(low)
    assert all(low - slack <= mark <= high + slack for mark in marks)
    if span > 1e-3 * abs(low):
        assert len(set(tick_labels(marks))) == len(marks)


broken = st.sampled_from([math.inf, -math.inf, math.nan])
values = st.lists(st.floats(-1e100, 1e100) | st.just(3.0) | broken, max_size=40)


@given(values)
def test_charts_stay_inside_their_frame_whatever_the_values(ys):
    svg = line_chart("t", {"act": (list(range(len(ys))), ys), "gen": ([0], [1.0])}, max(1, len(ys)))
    path = re.findall(r'class="line [^"]*" d="([^"]*)"', svg)
    for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", "".join(path)):
        assert 0 <= float(x) <= 270 and 0 <= float(y) <= 150
    assert path[0].count("M") + path[0].count("L") == sum(map(math.isfinite, ys))
    assert "nan" not in svg and "inf" not in svg


@given(values)
def test_a_sparkline_is_one_short_line(ys):
    line = sparkline(ys)
    assert len(line) == min(48, len(ys)) and set(line) <= set("▁▂▃▄▅▆▇█·")


def test_heat_maps_share_their_scale_and_keep_small_weights_visible():
    labels = ["a", "b", "c"]
    weak = np.array([[1.0, 0, 0], [0.99, 0.01, 0], [0.25, 0.25, 0.5]])
    first, second = heat_map("x", labels, weak), heat_map("x", labels, np.eye(3))
    opacity = lambda svg: set(re.findall(r'fill-opacity="([\d.]+)"', svg))  # noqa: E731
    assert opacity(second) == {"1.00"}
    assert {"1.00", "0.50", "0.08"} <= opacity(first)  # 1, 0.25 and 0.01 as square roots
    assert text_heat_map(labels, weak).splitlines()[2] == "3 c  ░░░░▓▓"
    broken = np.array([[math.nan, 0, 0], [math.inf, -1, 0], [5, 0, 0]])
    assert opacity(heat_map("x", labels, broken)) == {"1.00"}


def test_tables_of_markdown_are_aligned_for_any_script():
    cells = [["千と千尋", "0.1", "0.22"], ["a|b", "0.25", "–"]]
    table = Table(["", "HR@10", "MRR"], cells, best={(1, 1), (0, 2)}, strong=1)
    lines = to_markdown([Section("t", [table])]).split("\n\n")[1].splitlines()
    assert len({columns(line) for line in lines}) == 1
    assert "a\\|b" in lines[3] and "**0.25**" in lines[3]
    # digits of one column end in one place, marked or not
    assert columns(lines[2][:lines[2].index("0.1") + 3]) == columns(lines[3][:lines[3].index("0.25") + 4])


def test_best_values_are_marked_in_every_column_ties_too(run):
    change(run, "metrics.json", lambda m: m.update(rows={"popularity": {"HR@10": 0.2, "MRR": 0.1},
                                                         "karma": {"HR@10": 0.2, "MRR": 0.05}}))
    html, _ = texts(run)
    assert re.findall(r'<td class="best"><bdi>(.*?)</bdi>', html) == ["0.2000", "0.1000", "0.2000"]


# ---- attention map -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["eager", "sdpa"])
def model(request, monkeypatch, tiny_config, tiny_data, tmp_path):
    for module in ("backbone", "reading"):  # exact comparisons, whatever this CPU is fast at
        monkeypatch.setattr(f"karma_fast.model.{module}.compute_dtype", lambda device: torch.float32)
    tiny_config.model.attention = request.param
    return KarmaModel.build(tiny_config.model, tiny_data.items, tiny_data.sequences, tiny_data.split, device="cpu",
                            cache=tmp_path)


def test_an_attention_map_is_what_the_language_model_does_with_the_text(model):
    labels, weights = attention_map(model, [], query="Red Moon")
    ids = model.prompts.instruction + model.prompts.query_ids("Red Moon")
    assert labels[-1] == "[EMB]" and len(labels) == len(ids) + 1
    assert [label for label in labels if label != "␣"][:2] == [
        text for text in (model.tokenizer.decode([i]).strip() for i in ids) if text][:2]
    language_model = causal_lm(model.backbone)
    language_model.set_attn_implementation("eager")
    with torch.no_grad(), adapters_off(model.backbone):  # new adapters change nothing
        layers = language_model.base_model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    expected = torch.stack(layers).mean(dim=(0, 1, 2)).numpy()
    np.testing.assert_allclose(weights[:-1, :-1], expected, atol=1e-5)


def test_an_attention_map_is_causal_and_labelled_and_leaves_no_trace(model):
    history = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    kind, before = causal_lm(model.backbone).config._attn_implementation, model.encode_users([history])
    model.train()
    labels, weights = attention_map(model, history)
    assert weights.dtype == np.float32 and weights.shape == (len(labels), len(labels))
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert (np.triu(weights, 1) == 0).all() and (np.tril(weights)[np.tril_indices_from(weights)] > 0).all()
    last = model.config.max_history  # a longer history is cut as serving cuts it
    assert labels[-last - 1:] == [model.items.titles[i] for i in history[-last:]] + ["[EMB]"]
    assert model.training and causal_lm(model.backbone).config._attn_implementation == kind
    core = causal_lm(model.backbone).base_model
    assert not core._forward_hooks and not core._forward_pre_hooks
    torch.testing.assert_close(model.encode_users([history]), before)


def test_a_backbone_without_softmax_attention_has_no_map(tiny_config, tiny_data, tiny_backbone, tmp_path):
    from transformers import AutoTokenizer, RwkvConfig, RwkvForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    tokenizer.save_pretrained(tmp_path)
    RwkvForCausalLM(RwkvConfig(vocab_size=len(tokenizer), hidden_size=32, attention_hidden_size=32,
                               num_hidden_layers=2, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    config = dataclasses.replace(tiny_config.model, backbone=str(tmp_path), tuning="frozen")
    model = KarmaModel.build(config, tiny_data.items, tiny_data.sequences, tiny_data.split, device="cpu",
                             cache=tmp_path)
    with pytest.raises(NoAttention, match="RwkvForCausalLM: none of its layers"):  # it calls states attentions
        attention_map(model, [0, 1, 2])


def test_an_attention_map_goes_into_the_report(model, tmp_path):
    labels, weights = attention_map(model, [0, 1])
    (tmp_path / "attention.json").write_text(json.dumps({"labels": labels, "after": weights.tolist()}))
    html, markdown = texts(tmp_path)
    assert headings(markdown) == ["Attention"] and "Red Rocket" in html and "Before training" not in html
