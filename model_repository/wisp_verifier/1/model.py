from triton_models.verifier_model import TritonPythonModel  # noqa: F401
