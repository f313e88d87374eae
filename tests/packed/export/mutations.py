"""Files of others, damaged."""

from hypothesis import strategies as st


def mutated(good: bytes, data: st.DataObject, header: int | None = None) -> bytes:
    """The bytes with a few changes; most of them among the first ``header``, where that is given."""
    raw = bytearray(good)
    anywhere = st.integers(0, len(raw) - 1)
    place = anywhere if header is None else anywhere | st.integers(0, header - 1)
    for _ in range(data.draw(st.integers(1, 3), "changes")):
        at = min(data.draw(place, "at"), len(raw) - 1)
        kind = data.draw(st.sampled_from(["bit", "byte", "word", "insert", "delete", "cut"]), "kind")
        if kind == "bit":
            raw[at] ^= 1 << data.draw(st.integers(0, 7), "bit")
        elif kind == "byte":
            raw[at] = data.draw(st.integers(0, 255), "value")
        elif kind == "word":
            word = data.draw(st.sampled_from([2**63, 2**64 - 1, 2**32, 0, 255]), "word")
            raw[at : at + 8] = word.to_bytes(8, "little")
        elif kind == "insert":
            new = st.binary(min_size=1, max_size=40) | st.sampled_from([b"[" * 2000, b"9" * 400])
            raw[at:at] = data.draw(new, "inserted")
        else:
            del raw[at : at + data.draw(st.integers(1, 40), "deleted") if kind == "delete" else len(raw)]
        if not raw:
            break
    return bytes(raw)
