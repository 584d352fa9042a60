// The part of Cambricon's runtime header that the host half of a .mlu file and bindings.cpp use, for the emulator.
#pragma once

struct cnrtDim3_t {
  unsigned x, y, z;
};
enum cnrtFunctionType_t { cnrtFuncTypeBlock = 1 };
typedef struct bang_emu_queue *cnrtQueue_t;
enum cnrtDeviceAttr_t { cnrtAttrClusterCount, cnrtAttrMcorePerCluster };
