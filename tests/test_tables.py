import pytest
import torch

import data
import tables
from conftest import draw
from tables import TableError


def write(tmp_path, text, pictures=6):
    for i in range(pictures):
        draw(tmp_path / f"images/{i}.png", "cat", i)
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    return tmp_path / "labels.csv"


GOOD = """file,price,area,split,much
images/0.png,10,1.5,train,1
images/1.png,20,2.5,train,3
images/2.png,60,3.5, Train,2
images/3.png,1e2,4.5,valid,1
images/4.png,-5,5.5,test,0
"""


def test_read_table(tmp_path):
    table = tables.read_table(write(tmp_path, GOOD), ["area", "price"], data.split_by_hash, weight_column="much")
    assert table.targets == ["area", "price"]
    assert table.splits["train"] == [(str(tmp_path / f"images/{i}.png"), i) for i in range(3)]
    assert table.splits["val"] == [(str(tmp_path / "images/3.png"), 0)]
    assert table.values["train"].tolist() == [[1.5, 10], [2.5, 20], [3.5, 60]]
    assert table.values["test"].tolist() == [[5.5, -5]] and table.values["test"].dtype == torch.float64
    assert table.weights["train"].tolist() == [0.5, 1.5, 1.0]  # of mean 1
    assert table.weights["val"].tolist() == [0.5]
    text = tables.describe(table)
    row = next(line.split() for line in text.splitlines() if line.startswith("price"))
    assert row == ["price", "train", "3", "10", "30", "20", "60"]


def test_without_a_split_column_some_are_set_aside_and_a_byte_order_mark_is_no_name(tmp_path):
    text = "\ufefffile,price\n" + "".join(f"images/{i}.png,{i}\n" for i in range(6))
    one, two = (tables.read_table(write(tmp_path, text), ["price"], data.split_by_hash, 0.34) for _ in range(2))
    assert one.splits == two.splits and set(one.splits) == {"train", "val"}
    assert (len(one.splits["train"]), len(one.splits["val"])) == (4, 2)
    for split, found in one.splits.items():
        for path, row in found:
            assert path.endswith(f"/{one.values[split][row, 0]:.0f}.png")
    assert tables.fingerprint(one) == tables.fingerprint(two)
    assert tables.fingerprint(one) != tables.fingerprint(one._replace(targets=["cost"]))


@pytest.mark.parametrize("change, words", [
    (lambda t: None, "cannot read the labels .*labels.csv .No such file"),
    (lambda t: "", "holds no rows below its header"),
    (lambda t: t.replace("price", "cost"), "has no column 'price': there are file, cost, area, split, much"),
    (lambda t: t.replace("file", "path"), "has no column 'file'"),
    (lambda t: t.replace("area", "price"), "has the column 'price' twice: rename one"),
    (lambda t: t.replace("20", "n/a"), "labels.csv, line 3: price is 'n/a', which is not a number"),
    (lambda t: t.replace("20", ""), "line 3: price is '', which is not a number"),
    (lambda t: t.replace("60", "nan"), "line 4: price is nan: it must be finite"),
    (lambda t: t.replace("60", "-inf"), "line 4: price is -inf: it must be finite"),
    (lambda t: t + "images/5.png\n", "line 7: the split is '': write train, val or test"),
    (lambda t: t.replace("images/1", "images/x").replace("images/4", "y"),
     r"line 3: no such picture: .*images/x.png \(and 1 more are missing\)"),
    (lambda t: t.replace("images/1.png", ""), "line 3: no such picture"),
    (lambda t: t.replace("valid", "test"), "has no rows of the split val"),
    (lambda t: t.replace("rain", "est"), "the split is ' Test'|has no rows of the split train"),
    (lambda t: t.replace(",valid", ",dev"), "line 5: the split is 'dev': write train, val or test"),
    (lambda t: t.replace("valid,1", "valid,0"), "the weights of the split val add up to 0"),
    (lambda t: t.replace(",1\n", ",1e308\n").replace(",3\n", ",1e308\n"), "the weights of the split train add up to inf"),
    (lambda t: t.replace("60,", "6,000,"), "line 4: more cells than the header has columns; a number such as 1,234 needs"),
    (lambda t: t.replace(",", ";"), "is separated by semicolons: save it with commas"),
    (lambda t: t.replace("20", "10").replace("60", "10"), "price is 10 in every row of the training split"),
    (lambda t: t.replace("valid,1", "valid,-1"), "line 5: the weight much is -1: it must be 0 or above"),
    (lambda t: t.replace(",3\n", ",0\n").replace(",2\n", ",0\n").replace("train,1", "train,0"), "the weights of the split train add up to 0"),
])
def test_tables_that_cannot_be_used(tmp_path, change, words):
    file = write(tmp_path, GOOD)
    text = change(GOOD)
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(TableError, match=words) as error:
        tables.read_table(file, ["price"], data.split_by_hash, weight_column="much")
    assert "\n" not in str(error.value)


def test_no_logarithm_and_targets_named_twice(tmp_path):
    file = write(tmp_path, GOOD)
    with pytest.raises(TableError, match="line 6: price is -5, which has no logarithm: leave --log-target out"):
        tables.read_table(file, ["area", "price"], data.split_by_hash, log=True)
    file.write_text(file.read_text().replace("area", "price_prediction"))
    with pytest.raises(TableError, match="price_prediction could be a column of predictions of price: rename it"):
        tables.read_table(file, ["price", "price_prediction"], data.split_by_hash)
    with pytest.raises(TableError, match="the target price is named twice"):
        tables.read_table(file, ["price", "price"], data.split_by_hash)


def test_tables_as_spreadsheets_save_them(tmp_path):
    """Empty columns and rows at the end, spaces in the header, absolute paths."""
    rows = "".join(f"{tmp_path}/images/{i}.png,{i},,\n" for i in range(6))
    between = rows.replace(".png,", ".png,,,")
    for text in (f"file, price ,,\n{rows},,,\n,,,\n", f"file,,, price ,,\n{between}"):
        table = tables.read_table(write(tmp_path, text), ["price"], data.split_by_hash)
        assert sorted(v for values in table.values.values() for v in values.flatten().tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("values", [[[1e308], [-1e308]], [[1e-200], [2e-200]], [[1e200], [2e200]]])
def test_numbers_that_cannot_be_standardized(values):
    with pytest.raises(TableError, match="rescale them"):
        tables.fit_scale(torch.tensor(values, dtype=torch.float64))
    with pytest.raises(TableError, match="a target is .* standard deviations from"):
        tables.standardize(torch.tensor([[1e45]], dtype=torch.float64), {"mean": [0.0], "std": [1.0], "log": False})


@pytest.mark.parametrize("log", [False, True])
def test_standardizing_and_back(log):
    values = torch.rand(50, 3, dtype=torch.float64) * torch.tensor([1.0, 1e6, 1e-3], dtype=torch.float64) + 1e-6
    scale = tables.fit_scale(values, log)
    z = tables.standardize(values, scale)
    torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.square().mean(0), torch.ones(3, dtype=torch.float64))
    back, nothing = tables.to_own_units(z, scale)
    torch.testing.assert_close(back, values)
    assert nothing is None


def test_scaling_by_a_power_of_two_changes_no_bit():
    values = torch.rand(50, 2, dtype=torch.float64)
    one, other = tables.fit_scale(values), tables.fit_scale(values * 2**20)
    z = tables.standardize(values, one)
    assert torch.equal(z, tables.standardize(values * 2**20, other))
    assert torch.equal(tables.to_own_units(z, other)[0], 2**20 * tables.to_own_units(z, one)[0])


@pytest.mark.parametrize("log", [False, True])
def test_quantiles_never_cross_and_the_median_is_reported(log):
    scale = {"mean": [10.0, 2.0], "std": [2.0, 0.5], "log": log}
    outputs = torch.tensor([[[-1.0, 0.0, 1.0], [1.0, 3.0, 2.0]], [[5.0, 4.0, 3.0], [0.0, -1.0, 1.0]]])
    medians, quantiles = tables.to_own_units(outputs, scale, [0.1, 0.5, 0.9])
    expected = torch.tensor([[[8.0, 10, 12], [2.5, 3, 3.5]], [[16, 18, 20], [1.5, 2, 2.5]]], dtype=torch.float64)
    torch.testing.assert_close(quantiles, expected.exp() if log else expected)
    assert torch.equal(medians, quantiles[..., 1])
    rows = tables.prediction_rows(["a", "b"], ["x", "y"], medians, quantiles, [0.1, 0.5, 0.9], medians + 1)
    assert list(rows[1]) == ["file", "x", "x_prediction", "x_q0.1", "x_q0.5", "x_q0.9", "y", "y_prediction", "y_q0.1", "y_q0.5", "y_q0.9"]
    assert rows[1]["y"] == rows[1]["y_prediction"] + 1 == medians[1, 1].item() + 1 and rows[0]["x_q0.9"] == quantiles[0, 0, 2].item()
