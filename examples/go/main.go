// Command go shows the Go client: it creates a sandbox, writes a file, serves it from a
// port, and pauses the sandbox, which the next request resumes.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"

	"github.com/wrenn-dev/wrenn/client"
)

func main() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) (err error) {
	c, err := client.New(os.Getenv("WRENN_URL"), os.Getenv("WRENN_API_KEY"))
	if err != nil {
		return err
	}
	resume := true
	box, err := c.Create(ctx, client.CreateOptions{AutoResume: &resume, Metadata: map[string]string{"example": "go"}})
	if err != nil {
		return err
	}
	defer func() {
		if gone := c.Delete(ctx, box.ID); err == nil {
			err = gone
		}
	}()

	if _, err := c.WriteFile(ctx, box.ID, "/home/user/site/index.html", "", strings.NewReader("hello from a sandbox\n")); err != nil {
		return err
	}
	// The command ends once the server in the background answers.
	result, err := c.Exec(ctx, box.ID, client.Command{Shell: true, Cmd: `
		nohup python3 -m http.server 8000 --directory site >/dev/null 2>&1 &
		curl -fs --retry 100 --retry-delay 1 --retry-all-errors http://localhost:8000/`}, nil)
	if err != nil {
		return err
	}
	if result.ExitCode != 0 {
		return fmt.Errorf("the server does not start: exit code %d: %s", result.ExitCode, result.Stderr)
	}

	if _, err := c.Pause(ctx, box.ID); err != nil {
		return err
	}
	web := &http.Client{Transport: c.Transport()} // adds the API key
	answer, err := web.Get(c.URL(box, 8000))
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	page, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	fmt.Printf("%s: %s", answer.Status, page)
	return nil
}
