#include "torch_ext.h"
