// Command tandem-guest is PID 1 and agent of a container machine; see package guest.
package main

import (
	"os"

	"tandem/internal/guest"
)

func main() { guest.Main(os.Args) }
