package qmp

import "time"

// deadlinePast, as a deadline, ends every read and write at once.
var deadlinePast = time.Unix(1, 0)
