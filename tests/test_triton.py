"""Triton's kernels without a GPU: what they compute, and what they are compiled to.

The first test interprets them against the reference, in a process of its own. The others record
what the wrappers launch, compile exactly these kernels for several GPUs with the tools inside of
the triton wheel, and look at the result. Neither is a run on a GPU.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_adam_mini.kernels.tile_words import (
    COLUMN_WORDS,
    PACKED_WORDS,
    ROW_WORDS,
    WINDOW_WORDS,
    words,
)
from megatron_adam_mini.kernels.triton_tiles import (
    COLUMN_WINDOW_FIELDS,
    ROW_FIELDS,
    TILE_NUMEL,
    WINDOW_FIELDS,
    column_windows,
    row_tiles,
    windows,
)
from megatron_adam_mini.plan.column_table import ColumnTable
from megatron_adam_mini.plan.segment_table import SegmentTable
from tests.triton_cases import (
    COLUMNS,
    COLUMNS_IN_VECTORS,
    DTYPES,
    EIGHT_BITS,
    GRADS,
    LAYOUTS,
    MOMENTS,
    STORAGE,
    WHOLE_VECTORS,
    Case,
    ColumnCase,
    column_sum_sq,
    ordered_sums,
    segment_sum_sq,
    step_size,
    update,
    update_columns,
    update_elementwise,
    update_in_one_pass,
)  # fmt: skip

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_adam_mini.kernels import triton_gpu, triton_launch

ROOT = Path(__file__).parents[1]

FIELDS = fields(ColumnTable)

#: Every value of each dtype, and with each gradient every way to store parameters.
FEW_DTYPES = [
    (GRADS[0], MOMENTS[0], STORAGE[0]),
    (GRADS[0], MOMENTS[0], STORAGE[1]),
    (GRADS[1], MOMENTS[1], STORAGE[2]),
    (GRADS[0], MOMENTS[2], STORAGE[3]),
    (GRADS[1], MOMENTS[2], STORAGE[3]),
    (GRADS[0], MOMENTS[0], STORAGE[4]),
]

#: Registers per thread of 256-thread programs, of 65,536 per multiprocessor: 48 leave room for
#: five programs, 64 for four, 80 for three. Programs of single elements ("single"), which no
#: parameter of Megatron's needs, have a mask and a step size for every element. Columns with an m
#: of 8 bits ("codes") have two scales for every element, too.
REGISTERS = {
    "sum_kernel": 48,
    "update_kernel": 48,
    "update_columns_kernel": 64,
    "update_rows_kernel": 80,
    "update_elementwise_kernel": 64,
    "combine_kernel": 48,
    "column_sum_kernel": 48,
    "combine_columns_kernel": 48,
    "step_size_kernel": 48,
    "ordered_sum_kernel": 48,
    "norm_kernel": 64,
    "combine_norm_kernel": 64,
    "decide_kernel": 48,
    "single": 160,
    "codes": 80,
}


@pytest.mark.support("Triton kernels in the interpreter; on one H100 by tools/gpu_check.sh", "test")
def test_interpreted():
    """The parity tests pass; see triton_parity.py."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "tests/triton_parity.py", "tests/triton_replay.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d\d\d passed", result.stdout), result.stdout[-500:]


def recorded(monkeypatch, calls):
    """Return what calls of the wrappers would launch: ``(kernel, arguments by name)``."""
    launches = []

    def record(kernel, programs, *arguments, **constants):
        if programs:
            named = dict(zip(kernel.arg_names, arguments, strict=False))
            launches.append((kernel, named, constants))

    with monkeypatch.context() as patched:
        patched.setattr(triton_gpu, "launch", record)
        patched.setattr(triton_gpu, "on_device_of", lambda _: nullcontext())
        for call, case in calls:
            call(case, triton_gpu)
    return launches


def indexed_step_size(case, backend):
    step_size(case, backend, torch.arange(2))


def norm(case, backend):
    backend.norm_partials_(torch.zeros(2, 2, dtype=torch.float64), case.sum_sq, case.domain)


def decide(case, backend, inv_scale=None):
    stats, values = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    limits = {"clip_grad": 1.0, "skip_threshold": math.inf, "largest_sq": 1e9}
    backend.decide_(values, case.scalars.grad_scale, stats, inv_scale, **limits)


def decide_scaled(case, backend):
    decide(case, backend, torch.ones(1))


def ordered_sum(case, backend):
    backend.ordered_sum_(case.sum_sq, ordered_sums(0, 2, 2, len(case.sum_sq) - 2))


class Compiled:
    """A launch, compiled with the specialisation that Triton would choose for it."""

    def __init__(self, kernel, arguments, constants, capability):
        self.kernel, self.arguments = kernel.fn.__name__, arguments
        self.vec, self.once = constants.get("VEC"), constants.get("ONCE", True)
        signature, attributes = {}, {}
        for position, parameter in enumerate(kernel.params):
            value = arguments.get(parameter.name)
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = triton.runtime.jit.mangle_type(value)
                if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                    attributes[position,] = [["tt.divisibility", 16]]
            elif value is None:
                signature[parameter.name] = "constexpr"
            else:
                kind = "fp32" if isinstance(value, float) else "i32"
                signature[parameter.name] = parameter.annotation_type or kind
        fixed = {n: constants.get(n) for n, kind in signature.items() if kind == "constexpr"}
        self.key = f"{self.kernel} {signature} {fixed} {attributes}"
        self.source = ASTSource(kernel, signature, fixed, attributes)
        self.target = GPUTarget("cuda", capability, 32)

    def compile(self):
        result = triton.compile(self.source, target=self.target, options=triton_launch.OPTIONS)
        self.ttir = result.asm["ttir"]
        self.ptx = result.asm["ptx"]
        self.cubin = result.asm["cubin"]
        usage = self.inspect("-res-usage")
        self.usage = {k: int(n) for k, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        return self

    def inspect(self, option):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            result = subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            )
        return result.stdout + result.stderr

    def vectors(self, kind):
        """Return how often a thread loads (``ld``) or stores (``st``) how many bytes at once."""
        found = re.findall(kind + r"\.global[.\w:]*\.v(\d)\.b(\d+)", self.ptx)
        return Counter(int(count) * int(width) // 8 for count, width in found)

    def accesses(self, argument):
        """Return the loads and stores through a pointer, and all barriers, in their order."""
        pointers, found = {f"%{argument}"}, []
        for line in self.ttir.splitlines():
            made = re.match(r"\s*(%\w+) = tt\.(?:splat|addptr|broadcast) (%\w+)", line)
            used = re.search(r"\btt\.(load|store) (%\w+)", line)
            if made and made[2] in pointers:
                pointers.add(made[1])
            elif used and used[2] in pointers:
                found.append(used[1])
            elif re.match(r"\s*(?:gpu|ttg)\.barrier\b", line):
                found.append("barrier")
        return found

    def expected_vectors(self, kind):
        """Return the same, if each stream is moved once (g of long rows: twice), in vectors."""
        sums = self.kernel in ("sum_kernel", "column_sum_kernel")
        names = [] if sums else ["param", "exp_avg"]
        if self.kernel == "update_elementwise_kernel":
            names.append("exp_avg_sq")
        if names:  # quantized weights stay as they are
            weight, joined = self.arguments["weight"], self.arguments["param"].dtype == torch.int16
            written = weight is not None and weight.dtype != torch.uint8
            names += ["weight"] if (joined if kind == "ld" else written) else []
        if kind == "ld":
            names += ["grad"] if self.once else ["grad", "grad"]
        per_thread = TILE_NUMEL // (32 * triton_launch.OPTIONS["num_warps"]) // self.vec
        sizes = [self.arguments[n].element_size() for n in names if self.arguments[n] is not None]
        # Four bytes are no vector.
        sizes = [size for size in sizes if size * self.vec > 4]
        return Counter({n * self.vec: c * per_thread for n, c in Counter(sizes).items()})


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled(capability, monkeypatch):
    """Main path: all streams move in whole vectors, 16 bytes for the widest one. All paths: no
    spills, no atomics, few registers, and only correctly rounded arithmetic.

    A thread moves the same elements of all streams, so that nothing is exchanged between threads:
    next to float32 a 16-bit stream moves 8 bytes at once, and 16 where all streams have 16 bits.
    """
    main = capability == 90
    calls = [
        (call, (ColumnCase if call in (column_sum_sq, update_columns) else Case)(layout, *dtypes))
        for layout, call, dtypes_of_call in (
            # Main path: every combination of dtypes for one GPU, every value of each for others.
            ("few", update, DTYPES if main else FEW_DTYPES),
            ("few", update_elementwise, DTYPES if main else FEW_DTYPES[-2:]),
            ("few", update_in_one_pass, DTYPES if main else FEW_DTYPES[-2:]),
            # Rows of several passes, segments in parts, and other widths.
            ("passes", update_in_one_pass, FEW_DTYPES if main else FEW_DTYPES[1:2]),
            ("parts", update_in_one_pass, FEW_DTYPES[-1:]),
            ("rows", segment_sum_sq, FEW_DTYPES[1:2]),
            ("few", segment_sum_sq, FEW_DTYPES[-2:]),
            ("parts", segment_sum_sq, FEW_DTYPES[-2:-1]),
            # m in 8 bits, which no processor has to know of.
            ("few", update, EIGHT_BITS),
            ("few", update_elementwise, EIGHT_BITS[1:]),
            ("few", update_in_one_pass, EIGHT_BITS[1:]),
            ("matrix", update_columns, EIGHT_BITS[1:]),
            ("mixed", update, EIGHT_BITS[1:] if main else []),
            # Single elements.
            ("mixed", update, FEW_DTYPES[1:2]),
            ("mixed", update_elementwise, FEW_DTYPES[1:2] if main else []),
            ("mixed", update_in_one_pass, FEW_DTYPES[1:2] if main else []),
            ("odd parts", segment_sum_sq, FEW_DTYPES[1:2] if main else []),
            # Columns.
            ("matrix", update_columns, FEW_DTYPES if main else FEW_DTYPES[-3:]),
            ("odd runs", update_columns, FEW_DTYPES[1:2] if main else []),
            ("matrix", column_sum_sq, FEW_DTYPES[-2:]),
            ("odd columns", column_sum_sq, FEW_DTYPES[1:2] if main else []),
            ("few", step_size, FEW_DTYPES[:1]),
            ("few", indexed_step_size, FEW_DTYPES[:1] if main else []),
            ("few", norm, FEW_DTYPES[:1]),
            ("few", decide, FEW_DTYPES[:1]),
            ("few", decide_scaled, FEW_DTYPES[:1] if main else []),
            ("few", ordered_sum, FEW_DTYPES[:1]),
        )
        for dtypes in dtypes_of_call
    ]
    compiled = {}
    for launch in recorded(monkeypatch, calls):
        found = Compiled(*launch, capability)
        if found.key not in compiled:
            compiled[found.key] = found.compile()
    assert {found.kernel for found in compiled.values()} == REGISTERS.keys() - {"single", "codes"}
    registers: dict[str, int] = {}
    for key, found in compiled.items():
        kind = found.kernel if found.vec != 1 else "single"
        if kind == "update_columns_kernel" and found.arguments["exp_avg"].dtype == torch.uint8:
            kind = "codes"
        registers[kind] = max(registers.get(kind, 0), found.usage["REG"])
        assert found.usage["STACK"] == found.usage["LOCAL"] == 0, (key, found.usage)
        assert not re.findall(r"\b(?:fma|div\.full|atom|red)\.|\.approx|\.ftz", found.ptx), key
        if found.vec and found.vec > 1:
            for access in ("ld", "st"):
                assert found.vectors(access) == found.expected_vectors(access), key
            assert found.expected_vectors("ld")[16], key
    # The assembler keeps vectors whole (it may unroll loops). Disassembling takes about a second,
    # so one of each of the kernels that move most of the data is looked at.
    for kernel in ("sum_kernel", "update_kernel", "update_rows_kernel"):
        found = next(f for f in compiled.values() if f.kernel == kernel)
        operations = re.findall(r"\b(?:LD|ST|RED|ATOM)[A-Z]*[\w.]*", found.inspect("-sass"))
        assert not [op for op in operations if re.match(r"LDL|STL|RED\b|ATOM", op)], kernel
        for access, name in (("ld", "LDG.E.128"), ("st", "STG.E.128")):
            wide = sum(op.startswith(name) for op in operations)
            assert wide >= found.expected_vectors(access)[16], kernel
    print(f"sm_{capability}: {len(compiled)} kernels, most registers {registers}")
    assert {kind: n for kind, n in registers.items() if n > REGISTERS[kind]} == {}


def test_every_warp_reads_v_before_one_writes_it(monkeypatch):
    """Warps that hold elements of one row each read its v and compute its step size; one of them
    writes v. Without a barrier between them, a late warp would advance v twice."""
    calls = [(update_in_one_pass, Case(name, *FEW_DTYPES[3])) for name in ("rows", "parts")]
    kernels = set()
    for launch in recorded(monkeypatch, calls):
        found = Compiled(*launch, 90)
        if found.arguments.get("exp_avg_sq") is None:
            continue
        kernels.add(found.kernel)
        assert found.compile().accesses("exp_avg_sq") == ["load", "barrier", "store"], found.key
    assert kernels == {"update_rows_kernel", "combine_kernel"}


@pytest.mark.parametrize("vec", [1, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_cover_every_element_once(layout, vec):
    case = Case(layout)
    table = case.table
    length = table.end_S - table.start_S
    element, in_state, owner = case.at.numpy(), case.state_at.numpy(), table.indices.repeat(length)
    place = element - table.start_S.repeat(length)
    number = np.arange(len(element))
    expected = sorted(zip(element, in_state, owner, place, number, strict=True))

    seen = []
    for size, tiles in windows(table, vec, packed=True).items():
        for tile in tiles:
            field = dict(zip(WINDOW_FIELDS, tile.tolist(), strict=True))
            assert field["start"] % vec == 0
            assert 0 <= field["low"] < field["high"] <= TILE_NUMEL
            at = np.arange(field["low"], field["high"])
            row = (field["shift"] + at) // field["length"]
            place = (
                field["shift"] + at - row * field["length"] + np.where(row == 0, field["skip"], 0)
            )
            of_buffer = field["start"] + at
            of_state = of_buffer + field["shift_state"]
            seen += zip(
                of_buffer, of_state, field["index"] + row, place, field["packed"] + at, strict=True
            )
            if size > 1:
                for name in ("low", "high", "packed", "shift_state"):
                    assert field[name] % size == 0
                vector = row.reshape(-1, size)
                assert (vector == vector[:, :1]).all()
    assert sorted(seen) == expected

    seen = []
    for kind, tiles in row_tiles(table, vec):
        for tile in tiles:
            field = dict(zip(ROW_FIELDS, tile.tolist(), strict=True))
            length, count, shift = field["length"], field["count"], field["shift_state"]
            assert field["partial"] < 0 or count == 1
            assert count <= kind.rows
            assert length <= kind.columns or kind.columns == TILE_NUMEL
            assert kind.vec == 1 or field["start"] % kind.vec == length % kind.vec == 0
            assert shift % kind.vec == 0
            for row in range(count):
                at = field["start"] + row * length + np.arange(length)
                seen += zip(at, at + shift, np.full(length, field["index"] + row), strict=True)
    assert sorted(seen) == sorted(zip(element, in_state, owner, strict=True))


@pytest.mark.parametrize("vec", [1, 4, 8])
@pytest.mark.parametrize("layout", COLUMNS)
def test_windows_of_columns_cover_every_element_once(layout, vec):
    case = ColumnCase(layout)
    expected = []
    for run in range(len(case.table)):
        table = {field.name: int(getattr(case.table, field.name)[run]) for field in FIELDS}
        for at in range(table["start_C"], table["end_C"]):
            row, segment = divmod(table["skip_C"] + at - table["start_C"], table["width_C"])
            number = row * table["row_stride_C"] % 2**32
            expected.append((at, at + table["shift_C"], table["index_C"] + segment, number))

    seen = []
    for size, tiles in column_windows(case.table, vec).items():
        for tile in tiles:
            field = dict(zip(COLUMN_WINDOW_FIELDS, tile.tolist(), strict=True))
            assert 0 <= field["low"] < field["high"] <= TILE_NUMEL
            assert field["width"] >= size
            for name in ("start", "low", "high", "shift_state"):
                assert field[name] % size == 0
            x = np.arange(field["low"], field["high"])
            row, segment = np.divmod(field["place"] + x, field["width"])
            assert row.min() == 0
            at = field["start"] + x
            number = (field["number"] + row * field["row_stride"]) % 2**32
            seen += zip(
                at, at + field["shift_state"], field["index"] + segment, number, strict=True
            )
    assert sorted(seen) == expected


def test_layouts_as_megatron_makes_them_move_in_vectors():
    for layout in WHOLE_VECTORS:
        table = Case(layout).table
        assert set(windows(table, 8, packed=False)) == {8}
        assert {kind.vec for kind, _ in row_tiles(table, 8)} == {8}
    for layout in COLUMNS_IN_VECTORS:
        assert set(column_windows(ColumnCase(layout).table, 8)) == {8}


@pytest.mark.parametrize(("call", "launches"), [(column_sum_sq, 2), (update_columns, 1)])
def test_runs_that_begin_at_vectors_take_one_launch(call, launches, monkeypatch):
    """And their sums one more, which adds up parts."""
    for layout in COLUMNS_IN_VECTORS:
        case = ColumnCase(layout, torch.float32, *FEW_DTYPES[1][1:])
        if call is update_columns or not case.table.skip_C.any():
            assert len(recorded(monkeypatch, [(call, case)])) == launches


def test_only_state_that_suits_no_vector_is_moved_element_by_element():
    table = Case("odd slices").table
    assert table.shifts.tolist() == [-60, -60, -64, -63, -71]
    for vec, suiting in ((4, [-60, -64]), (8, [-64])):
        others = sorted(set(table.shifts.tolist()) - set(suiting))
        for tiles, field in (
            (windows(table, vec, packed=False), WINDOW_FIELDS.index("shift_state")),
            (rows_by_vec(table, vec), ROW_FIELDS.index("shift_state")),
        ):
            assert sorted(set(tiles[vec][:, field].tolist())) == sorted(suiting)
            assert sorted(set(tiles[1][:, field].tolist())) == others


def rows_by_vec(table, vec):
    kinds = row_tiles(table, vec)
    return {
        size: np.concatenate([tiles for kind, tiles in kinds if kind.vec == size])
        for size in (vec, 1)
    }


def test_offsets_beyond_32_bits():
    far = np.asarray([2**33 + 64], dtype=np.int64)
    table = SegmentTable(far, far + 2**31 + 4096, shift_S=-far)
    tiles = windows(table, 4, packed=True)[4]
    assert tiles[0, 0] == far[0]
    assert tiles[-1, 0] == far[0] + 2**31 + TILE_NUMEL
    assert (tiles[:, 1:6] <= TILE_NUMEL).all()
    assert (tiles[:, WINDOW_FIELDS.index("shift_state")] == -far).all()
    back = unpacked(words(tiles, WINDOW_FIELDS, PACKED_WORDS), WINDOW_FIELDS, PACKED_WORDS)
    skip = WINDOW_FIELDS.index("skip")  # kernels use its lower 32 bits
    assert tiles[-1, skip] > 2**31
    assert ((back[:, skip] - tiles[:, skip]) % 2**32 == 0).all()
    assert (np.delete(back, skip, 1) == np.delete(tiles, skip, 1)).all()


def unpacked(found, fields, layout):
    """Take words apart as the kernels do; numbers of 32 bits without a sign come back with one."""
    columns = {}
    for number, (upper, lower) in enumerate(layout):
        word = found[:, number]
        if lower is None:
            columns[upper] = word
        elif number < 2:
            columns[upper], columns[lower] = word >> 16, word & 0xFFFF
        else:
            columns[upper] = (word >> 32).astype(np.int32)
            columns[lower] = word.astype(np.int32)
    return np.stack([columns[name] for name in fields if name in columns], axis=1)


@pytest.mark.parametrize("shift", [0, 2**46, -(2**46)])
@pytest.mark.parametrize("layout", ["passes", "parts elsewhere", "odd slices", "odd parts"])
def test_words_hold_every_field_of_a_tile(layout, shift):
    near = Case(layout).table
    table = replace(near, shift_S=near.shifts + shift)
    for vec in (1, 8):
        for tiles in windows(table, vec, packed=True).values():
            found = words(tiles, WINDOW_FIELDS, PACKED_WORDS)
            assert (unpacked(found, WINDOW_FIELDS, PACKED_WORDS) == tiles).all()
            without = words(tiles, WINDOW_FIELDS, WINDOW_WORDS)
            assert (without == found[:, :4]).all()
        for _, tiles in row_tiles(table, vec):
            found = words(tiles, ROW_FIELDS, ROW_WORDS)
            assert (unpacked(found, ROW_FIELDS, ROW_WORDS) == tiles).all()


def test_words_hold_numbers_of_columns_beyond_31_bits():
    for layout in COLUMNS:
        table = ColumnCase(layout).table
        table = replace(table, row_stride_C=table.row_stride_C + 2**32 - 5)
        for tiles in column_windows(table, 4).values():
            found = words(tiles, COLUMN_WINDOW_FIELDS, COLUMN_WORDS)
            back = unpacked(found, COLUMN_WINDOW_FIELDS, COLUMN_WORDS)
            assert ((back - tiles) % 2**32 == 0).all()


def test_places_that_no_word_holds_are_refused():
    table = SegmentTable(*(np.asarray([2**47 + at]) for at in (0, 64)))
    tiles = windows(table, 4, packed=False)[4]
    with pytest.raises(
        ValueError, match=r"below 2\*\*47 = 140,737,488,355,328 .* Remedy: more data"
    ):
        words(tiles, WINDOW_FIELDS, WINDOW_WORDS)


def test_refuses_tensors_of_the_cpu():
    case = Case("few")
    message = (
        "Adam-mini backend='triton' got tensors on 'cpu'; allowed: 'cuda'. Choose another "
        "backend, or set TRITON_INTERPRET=1 to interpret the kernels."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        update(case, triton_gpu)
