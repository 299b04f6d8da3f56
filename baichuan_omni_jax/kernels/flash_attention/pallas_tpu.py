"""To come: TPU kernel."""


def unsupported(q, k, plan):
    return "not written yet"
