"""To come: GPU kernel."""


def unsupported(q, k, plan):
    return "not written yet"
