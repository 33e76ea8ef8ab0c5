"""What can go wrong, by kind; each error is also the builtin a caller would expect."""


class RtfmriError(Exception):
    """Base of every error this package raises on purpose."""


class GridError(RtfmriError, ValueError):
    """A shape or an affine that cannot be, or that differs from the run's."""


class VolumeError(RtfmriError, ValueError):
    """One volume that cannot be used; a run counts it, logs it and goes on."""


class EventsError(RtfmriError, ValueError):
    """An events file that is not BIDS, or that names what is not there."""


class ConfigError(RtfmriError, ValueError):
    """A setting that breaks its rule; no run starts with one."""


class SourceError(RtfmriError, OSError):
    """A source of volumes that cannot be opened or holds none."""


class RecordingError(RtfmriError, OSError):
    """A recording that cannot be written, read or recovered."""


class DeviceError(RtfmriError, RuntimeError):
    """A device was asked for that this machine cannot offer."""
