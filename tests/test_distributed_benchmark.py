"""The benchmark of divided layers: it counts what the formulas say, and its arithmetic holds together."""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="rich is in the demo extra")

from bench import cluster
from bench.limits import Work, attention_work, index_work
from sparse_attn import DSAConfig
from sparse_attn.distributed import traffic

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "distributed.py"
RECORDS = ROOT / "benchmarks" / "records"
CONFIG = DSAConfig.deepseek_v32()
MILLION = 1 << 20

spec = importlib.util.spec_from_file_location("benchmark_of_distributed", SCRIPT)
distributed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(distributed)


def run(*arguments, cwd=None):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


# Ranks of this machine


def test_measured_on_two_ranks(tmp_path, capsys):
    record = tmp_path / "record.jsonl"
    done = run("measure", "--dry-run", "--ranks", 1, 2, "--json", record, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = distributed.read(record)
    layer = {(row["case"], row["tp"], row["cp"]): row for row in lines["layer"]}
    assert {case for case, *_ in layer} == {"decode of 1", "decode of 8", "chunk of 32"}
    assert {(tp, cp) for _, tp, cp in layer} == {(1, 1), (1, 2), (2, 1)}
    for (_, _, cp), row in layer.items():
        assert row["received_bytes"] == row["formula_bytes"] and row["positions_equal"]
        assert row["share_of_keys"] == 1 / cp
        assert row["seconds"]["step"]["median"] >= row["seconds"]["collectives"]["median"]
        assert row["machine"]["threads"] == 1 and row["command"].startswith(
            "python benchmarks/distributed.py"
        )
    assert layer["decode of 1", 1, 2]["received_bytes"]["attention"] > 0
    ways = {(row["queries"], row["way"]): row for row in lines["indexer"]}
    assert all(row["rows_that_differ"] == 0 for (_, way), row in ways.items() if "summed" not in way)
    assert ways[32, "queries divided"]["received_bytes"] == traffic.selected(32, 24, 2)
    assert ways[32, "heads divided, logits summed"]["received_bytes"] == 2 * 32 * 96 * 4 // 2
    assert "decode of 8" in done.stdout and "rows differ" in done.stdout

    distributed.check(record)
    assert "step: predicted / measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, answer",
    [
        (["measure", "--ranks", "3"], "--ranks: expected numbers that divide 128 and 64 index heads, got 3"),
        (["measure", "--context", "2048"], "--context: expected more than the 2048 tokens"),
        (["measure", "--chunk", "0"], "--chunk: expected 1 to"),
        (["measure", "--rounds", "0"], "--rounds: expected 1 or more, got 0"),
        (
            ["check", "nothing.jsonl"],
            "record: expected a file that `measure --json` wrote, got nothing.jsonl",
        ),
    ],
)
def test_a_wrong_argument_is_answered_in_a_sentence(arguments, answer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distributed.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        distributed.main()
    assert answer in f"{stop.value} {capsys.readouterr().err}"


# Many cards


def division(tp=1, cp=1, step=(1, 1, MILLION), **others):
    return cluster.Division(CONFIG, cluster.Step(*step), cluster.Split(tp, cp), **others)


def test_one_card_is_the_sum_of_its_parts():
    card, links = cluster.H200, cluster.NODES_OF_8
    for sequences, context in ((1, 1 << 17), (32, 1 << 17)):
        one = division(step=(sequences, 1, context))
        seconds = one.seconds(card, links)
        assert tuple(seconds) == cluster.PARTS
        weights = 7168 * (1536 + 576 + 128 + 64) + 1536 * 64 * 128
        weights += 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
        assert sum(one.weights()) == weights
        expected = {
            "projections": 9 * 5e-6 + 2 * weights / card.project.bytes_per_second,
            "indexer": card.index.seconds(index_work(1, context, 64, 128) * sequences),
            "top-k": card.topk.seconds(sequences, context),
            "merge": 0.0,
            "attention": card.attend.seconds(attention_work(sequences, 2048, 128, 576, 512, 1152)),
            "collectives": 0.0,
        }
        assert seconds == pytest.approx(expected)
        found = cluster.best(CONFIG, one.step, 1, card, links)
        assert found is None if sequences == 32 else found == (one, seconds)
        assert one.received() == {"selection": 0, "attention": 0, "output": 0}


@pytest.mark.parametrize("step", [(1, 1, MILLION), (32, 1, 1 << 17), (1, 8192, 4 * MILLION)])
def test_more_cards_never_need_more_memory_per_card(step):
    for stored in (cluster.BF16, cluster.FP8):
        sizes = [
            [division(*split, step=step, stored=stored).keys_bytes() for split in cluster.splits(cards)]
            for cards in distributed.CARDS
        ]
        for fewer, more in itertools.pairwise(sizes):
            assert min(more) <= min(fewer) and max(more) <= max(fewer)
    assert division(step=step).keys_bytes() == step[0] * step[2] * (1152 + 256)


def test_bytes_are_those_of_the_formulas():
    decode, heads = division(cp=8), 128 // 8
    assert not decode.keys_travel and not decode.index_keys_travel
    assert decode.received() == {
        "selection": traffic.candidates(1, 2048, 2048, 8),
        "attention": traffic.partial_outputs(1, heads, 576, 512, 2, 8),
        "output": 2 * 7168 * 2 * 7 // 8,
    }
    both = division(tp=2, cp=4, step=(32, 1, MILLION))
    selected = traffic.selected(32, 2048, 2)
    assert both.received()["selection"] == traffic.candidates(16, 2048, 2048, 4) + selected
    chunk = division(cp=8, step=(1, 8192, 1 << 17))
    assert chunk.keys_travel and chunk.index_keys_travel
    keys = traffic.keys(1 << 14, 256, 8) + traffic.selected(8192, 2048, 8)
    assert chunk.received()["selection"] == keys
    assert chunk.received()["attention"] == traffic.keys(1 << 14, 1152, 8)


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="context: expected more than the 2048 tokens"):
        division(step=(1, 1, 2048))
    with pytest.raises(ValueError, match="split: expected cards that divide 128 heads, got 3"):
        division(tp=3)


def test_rates_of_the_card_are_those_of_its_record():
    """Each kernel of the plan within a third of what was measured, over all sizes of the record."""
    lines = [json.loads(line) for line in (RECORDS / "2026-11-27-h200.jsonl").read_text().splitlines()]
    card, seen = cluster.H200, 0
    for line in lines:
        seconds, context = line["seconds"], line["context"]
        if line["operation"] == "layer":
            queries = line.get("tokens") or (
                int(line["data"].split()[1]) if "sequences" in line["data"] else 1
            )
            chunk = "prefill" in line["data"]
            index = (
                index_work(queries, context, 64, 128) if chunk else index_work(1, context, 64, 128) * queries
            )
            passes = -(-4 * queries * context // (256 << 20)) if chunk else 1
            model = {
                "indexer": card.index.seconds(index, passes),
                "top-k": passes * card.topk.seconds(queries / passes, context),
                "attend": card.attend.seconds(attention_work(queries, 2048, 128, 576, 512, 1152)),
            }
        elif line["operation"] == "merge":
            model = {"merge_attention": card.merge.seconds(Work(bytes=line["bytes"]))}
        elif "heads" in line["data"]:
            model = {"attend": card.attend.seconds(Work(line["operations"], line["bytes"]))}
        else:
            continue
        for name, time in model.items():
            assert 0.7 < time / seconds[name]["median"] < 1.35, (
                line["operation"],
                line["data"],
                context,
                name,
            )
            seen += 1
    assert seen > 40
    limits = lines[0]["limits"]
    assert card.project.operations_per_second == pytest.approx(limits["operations_per_second"], rel=0.01)
    assert card.project.bytes_per_second == pytest.approx(limits["bytes_per_second"], rel=0.01)


def test_the_page_holds_what_is_computed():
    page = distributed.PAGE.read_text()
    _, _, rest = page.partition(distributed.BEGIN)
    computed = distributed.markdown(CONFIG, distributed.planned(CONFIG))
    assert rest.partition(distributed.END)[0].strip() == computed, (
        "run python benchmarks/distributed.py plan --write"
    )


def test_what_travels_in_the_plan_is_what_the_layer_chose():
    """The record's counted bytes, computed anew: the plan's choices are those of the product."""
    for row in distributed.read(distributed.RECORD)["layer"]:
        again = distributed.division_of_row(row)
        assert again.received() == row["received_bytes"] == row["formula_bytes"]
        assert dataclasses.astuple(again)[2] == (row["tp"], row["cp"])
