"""Device functions that read a matrix of an adapter out of arena rows, through the slot table."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are Triton's dialect: their arguments have no Python types.

import triton
import triton.language as tl


@triton.jit
def granules(pointers, mask, GRANULE: tl.constexpr):
    """Load runs of ``GRANULE`` adjacent elements as one tile.

    pointers  [R, C], the first element of each run; aligned to the run where GRANULE > 1
    mask      [R, C], which runs are read; the others are zeros
    Returns [R, C * GRANULE]. With GRANULE = 8 and 16-bit elements each run is one 16-byte load.
    """
    p = pointers[:, :, None] + tl.arange(0, GRANULE)[None, None, :]
    if GRANULE > 1:
        p = tl.max_contiguous(tl.multiple_of(p, (1, 1, 16)), (1, 1, GRANULE))
    m = tl.broadcast_to(mask[:, :, None], (pointers.shape[0], pointers.shape[1], GRANULE))
    return tl.reshape(tl.load(p, mask=m, other=0.0), (pointers.shape[0], pointers.shape[1] * GRANULE))


@triton.jit
def load_matrix(plane, slots, first_slot, row_stride, element, mask, WIDTH: tl.constexpr, GRANULE: tl.constexpr):
    """Elements of an adapter's matrix, as a tile [R, C * GRANULE].

    plane       pointer to the plane's rows, ``row_stride`` elements apart, WIDTH of them used
    slots       pointer to the adapter's row of the slot table
    first_slot  the adapter's first slot where its slots are one contiguous run (the table is not read), else negative
    element     int32 [R, C], counted through the adapter's arena rows, first of each run of GRANULE; a run must not
                cross a row: GRANULE divides both WIDTH and every element
    mask        [R, C], which runs are read
    """
    row = element // WIDTH
    run = tl.broadcast_to(first_slot, row.shape)
    slot = tl.load(slots + row, mask=mask & (run < 0), other=0)
    slot = tl.where(run < 0, slot, run + row).to(tl.int64)
    return granules(plane + slot * row_stride + element % WIDTH, mask, GRANULE)


@triton.jit
def adapter_rows(p_slots, p_first_slots, adapter, slots_stride):
    """Where an adapter's rows are, as ``load_matrix`` wants it: its row of the slot table, and its first slot."""
    return p_slots + adapter.to(tl.int64) * slots_stride, tl.load(p_first_slots + adapter)
