"""What a build does where it is told nothing else: read by signatures and by flags.

Nothing heavy is imported here, so that the command line can show its flags at once.
"""

MODULES = "mlp,head"
FIT_SEQUENCES = 4096
LABELS = ("model", "data")  # whose labels the curvature is fitted on; the first is the default
COVARIANCE_BLOCKS = 1
DAMPING = 0.1  # of mean(Λ), as in Grosse et al. 2023, §5
AUTO = "auto"  # of dtype and device
EIGEN_DTYPES = (AUTO, "float64", "float32")
SEGMENT_SIZE = 4096
MAX_BAD = 0.001
SEED = 0
LONGEST = 512  # tokens of a sequence, where the model's context is longer
