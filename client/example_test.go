package client_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"

	"github.com/wrenn-dev/wrenn/client"
)

// Create a sandbox, run a command in it, and delete it.
func Example() {
	ctx := context.Background()
	c, err := client.New("http://localhost:8000", os.Getenv("WRENN_API_KEY"), testService)
	if err != nil {
		log.Fatal(err)
	}
	box, err := c.Create(ctx, client.CreateOptions{Metadata: map[string]string{"purpose": "example"}})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Delete(ctx, box.ID)
	result, err := c.Exec(ctx, box.ID, client.Command{Cmd: "python3", Args: []string{"-"}}, []byte("print(6*7)"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("exit code %d: %s", result.ExitCode, result.Stdout)
	// Output: exit code 0: 42
}

// An iterator asks for the next page when it needs it.
func ExampleClient_List() {
	c, err := client.New("http://localhost:8000", os.Getenv("WRENN_API_KEY"), testService)
	if err != nil {
		log.Fatal(err)
	}
	for box, err := range c.List(context.Background(), client.ListOptions{}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(box.ID, box.State)
	}
	// Output:
	// cl-1 running
	// cl-2 paused
}

// Copies of a sandbox continue from its present state, memory included.
func ExampleClient_Fork() {
	ctx := context.Background()
	c, err := client.New("http://localhost:8000", os.Getenv("WRENN_API_KEY"), testService)
	if err != nil {
		log.Fatal(err)
	}
	copies, err := c.Fork(ctx, "cl-1", 2)
	if err != nil {
		log.Fatal(err)
	}
	for _, box := range copies {
		fmt.Println(box.ID, "forked from", box.ForkedFrom)
	}
	// Output:
	// cl-3 forked from cl-1
	// cl-4 forked from cl-1
}

// The error of a call has a code for programs and a message for people.
func ExampleIsNotFound() {
	c, err := client.New("http://localhost:8000", os.Getenv("WRENN_API_KEY"), testService)
	if err != nil {
		log.Fatal(err)
	}
	_, err = c.Get(context.Background(), "cl-unknown")
	fmt.Println(client.IsNotFound(err), err)
	// Output: true get sandbox: no such sandbox
}

// A webhook checks the signature before it believes the body.
func ExampleVerifyWebhook() {
	handler := func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
		if err == nil {
			err = client.VerifyWebhook(r.Header, body, os.Getenv("CHANNEL_SECRET"), 0)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnauthorized)
			return
		}
		fmt.Fprintln(w, "thank you")
	}
	answer := httptest.NewRecorder()
	handler(answer, httptest.NewRequest(http.MethodPost, "/hook", strings.NewReader(`{"event":"sandbox.lost"}`)))
	fmt.Print(answer.Code, " ", answer.Body)
	// Output: 401 the request has no valid Wrenn-Signature header
}
