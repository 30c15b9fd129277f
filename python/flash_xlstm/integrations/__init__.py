"""Other libraries' models, trainers and servers on this package's kernels."""
