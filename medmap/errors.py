"""The errors a user can meet.

    MedmapError
    ├── InputError        a file, folder, image or argument is not what it must be
    ├── ConfigError       a key or value of the configuration
    ├── CheckpointError   weights that do not fit, or a run folder that is not whole
    ├── DivergenceError   training produced a number that is not finite
    └── ClusterError      machines or processes that cannot be reached, or that die at the work

Every message names the thing, what was found, what was expected and what to do.
"""


class MedmapError(Exception):
    """Base of every error that medmap raises for a user; the command line prints it without a traceback."""


class InputError(MedmapError):
    """A file, folder, image or argument is not what it must be."""


class ConfigError(MedmapError):
    """A key or value of the configuration is wrong."""


class CheckpointError(MedmapError):
    """Weights do not fit the network, or a run folder is not whole."""


class DivergenceError(MedmapError):
    """Training produced a loss or a gradient that is not finite."""


class ClusterError(MedmapError):
    """Machines or processes that should do the work cannot be reached, or die at it."""
