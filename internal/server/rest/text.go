package rest

import (
	"net/http"
	"net/url"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/text"
)

func notText(where string) error {
	return fault.New(fault.InvalidArgument, "%s: must be UTF-8 without NUL", where)
}

// checkText refuses invalid text in a request's path, query and headers. readBody checks
// strings in bodies.
func checkText(r *http.Request, params map[string]string) error {
	for name, value := range params {
		if !text.Valid(value) {
			return notText(name)
		}
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return fault.Because(err, fault.InvalidArgument, "query: malformed")
	}
	for name, values := range query {
		if !text.Valid(name) {
			return notText("query")
		}
		for _, value := range values {
			if !text.Valid(value) {
				return notText(name)
			}
		}
	}
	for name, values := range r.Header {
		if name == "Cookie" {
			continue // Other sites of the domain can set cookies. net/http drops malformed ones.
		}
		for _, value := range values {
			if !text.Valid(value) {
				return notText(name)
			}
		}
	}
	return nil
}
