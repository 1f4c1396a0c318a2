from triton_models.generate_model import TritonPythonModel  # noqa: F401
