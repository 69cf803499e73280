// The C face of torch_ext.cpp. Every function returns nullptr on success, else a malloc'd message to be freed with free().
#pragma once
