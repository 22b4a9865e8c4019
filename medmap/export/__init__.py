"""A trained model in forms that can be given away: ONNX graphs, a MONAI bundle, a clean model folder."""
