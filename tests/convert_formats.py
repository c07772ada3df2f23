"""FP8 and NVFP4 checkpoints written from the formats' descriptions, and read back, with NumPy alone."""

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3_values():
    """The value of each of the 256 codes: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinities."""
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 0xF, codes & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values[(codes & 0x7F) == 0x7F] = np.nan
    return (sign * values).astype(np.float32)


E4M3 = e4m3_values()


def nearest(values, table):
    """Index of the entry of `table` nearest to each value; entries that are NaN are never chosen."""
    order = np.argsort(table, kind="stable")
    order = order[~np.isnan(table[order])]
    sorted_table = table[order]
    right = np.clip(np.searchsorted(sorted_table, values), 1, len(order) - 1)
    left_is_nearer = values - sorted_table[right - 1] <= sorted_table[right] - values
    return order[np.where(left_is_nearer, right - 1, right)].astype(np.uint8)


def to_bf16(values):
    """float32 → bfloat16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def floats(tensor):
    """A (dtype, shape, bytes) tensor as float32."""
    dtype, shape, data = tensor
    values = {"BF16": lambda: from_bf16(np.frombuffer(data, np.uint16)), "F32": lambda: np.frombuffer(data, np.float32)}
    return values[dtype]().reshape(shape)


def bf16_tensor(values):
    return ("BF16", values.shape, to_bf16(values).tobytes())


def f32_tensor(values):
    values = np.asarray(values, np.float32)
    return ("F32", values.shape, values.tobytes())


def fp8_tensors(name, values):
    """{key: tensor} of one FP8 linear, e4m3 with a bf16 scale per output channel, and its values again."""
    scale = from_bf16(to_bf16(np.abs(values).max(-1, keepdims=True) / 448 + 1e-12))
    codes = nearest(values / scale, E4M3)
    tensors = {f"{name}.weight": ("F8_E4M3", codes.shape, codes.tobytes()), f"{name}.weight_scale": bf16_tensor(scale)}
    return tensors, E4M3[codes] * scale


def nvfp4_tensors(name, values):
    """{key: tensor} of one NVFP4 linear: two fp4 a byte, low one first; e4m3 scale per 16; float32 scale; and its
    values again.
    """
    *rows, columns = values.shape
    tensor_scale = np.float32(np.abs(values).max() / (6 * 448))
    blocks = values.reshape(*rows, columns // 16, 16)
    scales = nearest(np.abs(blocks).max(-1) / 6 / tensor_scale, E4M3)
    per_value = E4M3[scales][..., None] * tensor_scale
    codes = nearest(np.divide(blocks, per_value, out=np.zeros_like(blocks), where=per_value != 0), E2M1)
    decoded = (E2M1[codes] * per_value).reshape(values.shape)
    flat = codes.reshape(values.shape)
    packed = flat[..., 0::2] | flat[..., 1::2] << 4
    tensors = {
        f"{name}.weight": ("U8", packed.shape, packed.tobytes()),
        f"{name}.weight_scale": ("F8_E4M3", scales.shape, scales.tobytes()),
        f"{name}.weight_scale_2": ("F32", (), tensor_scale.tobytes()),
        f"{name}.input_scale": ("F32", (), np.float32(1).tobytes()),
    }
    return tensors, decoded


def quantize_experts(tensors, encode):
    """Per-expert keys with every expert's projections encoded, and the same checkpoint in float32, stacked."""
    encoded, decoded = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            encoded[name] = tensor
            decoded[name] = f32_tensor(floats(tensor))
            continue
        home, stack = name.rpartition(".")[0], floats(tensor)
        values = np.empty_like(stack)
        for expert, matrix in enumerate(stack):
            halves = ("gate", "up") if name.endswith("gate_up_proj") else ("down",)
            rows = len(matrix) // len(halves)
            for i, half in enumerate(halves):
                part = slice(i * rows, (i + 1) * rows)
                added, values[expert, part] = encode(f"{home}.{expert}.{half}_proj", matrix[part])
                encoded |= added
        decoded[name] = f32_tensor(values)
    return encoded, decoded


def quantize_linears(tensors, encode, endings):
    """The same for the linears whose names end so."""
    encoded, decoded = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(endings)]:
        added, values = encode(name.removesuffix(".weight"), floats(encoded.pop(name)))
        encoded |= added
        decoded[name] = f32_tensor(values)
    return encoded, decoded
