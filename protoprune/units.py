"""Sizes and times as people read them: decimal units, as disks and networks are sold."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """'512 bytes', '3.1 kB', '1.2 GB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def duration(seconds: float) -> str:
    """'8.4 s', '3m12s', '2h05m'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def rounded(value: float, digits: int = 1, sign: str = "") -> str:
    """A number with so many digits after the point, and no minus before a zero: '0.0', with `sign` + '+0.0'."""
    text = f"{value:{sign}.{digits}f}"
    return text if float(text) else text.replace("-", sign)


def many(count: float, one: str, more: str | None = None) -> str:
    """'1 image', '1,234 images'; `more` where that is not `one` with an s: 'image has', 'images have'."""
    return f"{count:,} {one if count == 1 else one + 's' if more is None else more}"
