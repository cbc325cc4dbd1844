"""Durations as text, in Slurm's form and with units."""


def clock(seconds: float) -> str:
    """A duration in Slurm's form: 3:20, 1:02:03 or 2-01:02:03; negative ones as 0:00."""
    days, hours, minutes, rest = _split(seconds)
    if days or hours:
        return f"{f'{days}-{hours:02d}' if days else hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """A duration in its two largest units, without zeros: 45 s, 1 min 15 s, 2 h 1 min or 2 d 7 h."""
    counts = _split(seconds)
    first = next((place for place, count in enumerate(counts) if count), 3)
    shown = list(zip(counts, ("d", "h", "min", "s")))[first : first + 2]
    return " ".join(f"{count} {unit}" for count, unit in shown if count or first == 3)


def about(seconds: float) -> str:
    """A duration as one speaks of it: "248 days" from two days on, else as `duration`."""
    days = seconds / 86_400
    return f"{days:,.0f} days" if days >= 2 else duration(seconds)


def _split(seconds: float) -> tuple[int, int, int, int]:
    """Days, hours, minutes and seconds, rounded; 0 for a negative duration."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return days, hours, minutes, rest
