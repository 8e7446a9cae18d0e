// Nothing of it is used here.
#pragma once
