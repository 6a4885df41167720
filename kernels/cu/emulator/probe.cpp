// Whether there is a C++ compiler, with its library.
#include <vector>
int tidemill_probe() { return int(std::vector<int>(1).size()); }
