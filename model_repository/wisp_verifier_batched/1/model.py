from triton_models.batched_model import TritonPythonModel  # noqa: F401
