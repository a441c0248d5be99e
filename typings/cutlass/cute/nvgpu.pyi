from typing import Any

class OperandMajorMode:
    K: OperandMajorMode
    MN: OperandMajorMode

warpgroup: Any
