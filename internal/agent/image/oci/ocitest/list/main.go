// The program list prints the listing of its root file system, in a guest without other
// programs. "list serve" responds to every request on port 8000 with a line about its
// process.
package main

import (
	"fmt"
	"net/http"
	"os"

	"github.com/wrenn-dev/wrenn/internal/agent/image/oci/ocitest/listing"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) > 1 {
		dir, err := os.Getwd()
		if err != nil {
			return err
		}
		self := fmt.Sprintf("pid %d user %d:%d in %s B=%s", os.Getpid(), os.Getuid(), os.Getgid(), dir, os.Getenv("B"))
		return http.ListenAndServe(":8000", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, self) }))
	}
	lines, err := listing.Of("/")
	if err != nil {
		return err
	}
	for _, l := range lines {
		fmt.Println(l)
	}
	return nil
}
