"""medmap: brain-tumour segmentation that keeps working when MRI sequences are missing."""

__version__ = "0.1.0"
