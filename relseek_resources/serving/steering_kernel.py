"""The steering op on a GPU: one program a token, which leaves at once where its token is not steered.

Here belongs the Triton kernel alone. Its arithmetic is that of `steering_op.steer_plain`, with which it is compared.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["layer"])  # one kernel for all blocks: none is compiled while a graph is recorded
def steer_token(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    hidden,  # (tokens, width), rows `hidden_row` apart
    residual,  # (tokens, width), rows `residual_row` apart
    slot_of_token,  # int32 (tokens,)
    spans,  # int32 (slots, blocks + 1), rows `spans_row` apart
    modes,  # int32 (entries,)
    rows,  # int32 (entries,)
    values,  # float32 (entries,)
    bank,  # float32 (rows, width)
    layer,
    width,
    spans_row,
    hidden_row,
    residual_row,
    BLOCK: tl.constexpr,  # the least power of two that holds a row
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_of_token + token)
    if slot > 0:
        begin = tl.load(spans + slot * spans_row + layer)
        end = tl.load(spans + slot * spans_row + layer + 1)
        if end > begin:
            columns = tl.arange(0, BLOCK)
            inside = columns < width
            at_hidden = hidden + token * hidden_row + columns
            at_residual = residual + token * residual_row + columns
            left = tl.load(at_hidden, mask=inside, other=0.0)
            stream = (left.to(tl.float32) + tl.load(at_residual, mask=inside, other=0.0).to(tl.float32)).to(left.dtype)
            for entry in range(begin, end):
                mode = tl.load(modes + entry)
                value = tl.load(values + entry)
                vector = tl.load(bank + tl.load(rows + entry).to(tl.int64) * width + columns, mask=inside, other=0.0)
                wide = stream.to(tl.float32)
                projection = tl.sum(wide * vector, axis=0)
                beyond = value - projection
                amount = tl.where(mode == 1, tl.maximum(beyond, 0.0), tl.minimum(beyond, 0.0))
                amount = tl.where(mode == 3, -value * projection, amount)
                change = tl.where(mode == 0, value, amount) * vector
                change = tl.where(mode == 0, change.to(left.dtype).to(tl.float32), change)
                stream = (wide + change).to(left.dtype)
            tl.store(at_hidden, tl.zeros_like(stream), mask=inside)
            tl.store(at_residual, stream, mask=inside)
