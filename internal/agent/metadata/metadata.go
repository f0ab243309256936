// Package metadata serves a guest a document about itself, over the protocol of
// Firecracker's MMDS version 2: the guest gets a token, and with it the document or
// parts of it, as JSON or as plain text.
package metadata

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"mime"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/net/netutil"
)

const (
	tokenPath = "/latest/api/token"
	maxTTL    = 21600 // seconds

	// maxConnections is the number of connections served at once; others wait.
	maxConnections = 16
)

// A Server serves one guest its document.
type Server struct {
	key  [32]byte // signs tokens, which are valid for this server only
	doc  atomic.Pointer[any]
	http *http.Server
}

// New makes a server without a document, which responds with 404 until [Server.Set].
func New() *Server {
	s := &Server{}
	_, _ = rand.Read(s.key[:]) // never fails
	s.http = &http.Server{
		Handler:           s,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    8 << 10,
		// A guest cannot fill the agent's log.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	return s
}

// Set replaces the document by doc, which must encode to a JSON object.
func (s *Server) Set(doc any) error {
	text, err := json.Marshal(doc)
	if err != nil {
		return fmt.Errorf("encode metadata: %w", err)
	}
	var tree any
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&tree); err != nil {
		return fmt.Errorf("decode metadata: %w", err)
	}
	if _, ok := tree.(map[string]any); !ok {
		return errors.New("metadata is not a JSON object")
	}
	s.doc.Store(&tree)
	return nil
}

// Serve serves requests on l until [Server.Close]. It closes l.
func (s *Server) Serve(l net.Listener) error {
	err := s.http.Serve(netutil.LimitListener(l, maxConnections))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Close ends Serve and every connection.
func (s *Server) Close() error { return s.http.Close() }

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Server", "Wrenn Metadata")
	switch r.Method {
	case http.MethodPut:
		s.putToken(w, r)
	case http.MethodGet:
		s.get(w, r)
	default:
		w.Header().Set("Allow", "GET, PUT")
		fail(w, http.StatusMethodNotAllowed, "Not allowed HTTP method.")
	}
}

// header returns the first header of these names that the request has. MMDS has two
// names for each header.
func header(r *http.Request, names ...string) string {
	for _, n := range names {
		if v := r.Header.Get(n); v != "" {
			return v
		}
	}
	return ""
}

func (s *Server) putToken(w http.ResponseWriter, r *http.Request) {
	const ttlHeader = "X-Metadata-Token-Ttl-Seconds"
	if r.URL.Path != tokenPath {
		fail(w, http.StatusNotFound, "Resource not found: "+r.URL.Path+".")
		return
	}
	// Refuse forwarded requests, because somebody may have tricked a proxy in the guest.
	if len(r.Header.Values("X-Forwarded-For")) > 0 {
		fail(w, http.StatusBadRequest, "Invalid header. Reason: Header X-Forwarded-For is not allowed.")
		return
	}
	text := header(r, ttlHeader, "X-Aws-Ec2-Metadata-Token-Ttl-Seconds")
	if text == "" {
		fail(w, http.StatusBadRequest, "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.")
		return
	}
	ttl, err := strconv.ParseUint(text, 10, 32)
	if err != nil || ttl < 1 || ttl > maxTTL {
		fail(w, http.StatusBadRequest, fmt.Sprintf("Invalid time to live value provided for token. Please provide a value between 1 and %d.", maxTTL))
		return
	}
	w.Header().Set(ttlHeader, strconv.FormatUint(ttl, 10))
	w.Header().Set("Content-Type", "text/plain")
	_, _ = io.WriteString(w, s.token(time.Now().Add(time.Duration(ttl)*time.Second)))
}

// token returns a signed expiry time, so that the server keeps no state for a guest's
// tokens.
func (s *Server) token(until time.Time) string {
	t := binary.BigEndian.AppendUint64(nil, uint64(until.UnixMilli()))
	return base64.URLEncoding.EncodeToString(append(t, s.sign(t)...))
}

func (s *Server) sign(t []byte) []byte {
	m := hmac.New(sha256.New, s.key[:])
	m.Write(t)
	return m.Sum(nil)
}

func (s *Server) valid(token string, now time.Time) bool {
	b, err := base64.URLEncoding.DecodeString(token)
	if err != nil || len(b) != 8+sha256.Size {
		return false
	}
	return hmac.Equal(b[8:], s.sign(b[:8])) && now.UnixMilli() < int64(binary.BigEndian.Uint64(b))
}

func (s *Server) get(w http.ResponseWriter, r *http.Request) {
	token := header(r, "X-Metadata-Token", "X-Aws-Ec2-Metadata-Token")
	if token == "" {
		fail(w, http.StatusUnauthorized, "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session token.")
		return
	}
	if !s.valid(token, time.Now()) {
		fail(w, http.StatusUnauthorized, "MMDS token not valid.")
		return
	}
	asJSON, ok := acceptsJSON(r.Header.Values("Accept"))
	if !ok {
		fail(w, http.StatusNotAcceptable, "Unsupported media type. Use `application/json` or `text/plain`.")
		return
	}
	value, ok := s.find(r.URL.Path)
	if !ok {
		fail(w, http.StatusNotFound, "Resource not found: "+r.URL.Path+".")
		return
	}
	if asJSON {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(value)
		return
	}
	text, ok := plain(value)
	if !ok {
		fail(w, http.StatusNotImplemented, "Cannot retrieve value. The value has an unsupported type.")
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	_, _ = io.WriteString(w, text)
}

// acceptsJSON chooses between JSON and plain text. ok is false if the client accepts
// neither.
func acceptsJSON(accept []string) (asJSON, ok bool) {
	if len(accept) == 0 {
		return false, true
	}
	for part := range strings.SplitSeq(strings.Join(accept, ","), ",") {
		kind, _, err := mime.ParseMediaType(strings.TrimSpace(part))
		if err != nil {
			continue
		}
		switch kind {
		case "application/json":
			return true, true
		case "text/plain", "plain/text", "text/*", "*/*":
			return false, true
		}
	}
	return false, false
}

// find finds the value at a path, which is a JSON pointer (RFC 6901). It ignores doubled
// and trailing slashes.
func (s *Server) find(path string) (any, bool) {
	doc := s.doc.Load()
	if doc == nil {
		return nil, false
	}
	value := *doc
	for key := range strings.SplitSeq(path, "/") {
		if key == "" {
			continue
		}
		key = strings.NewReplacer("~1", "/", "~0", "~").Replace(key)
		switch v := value.(type) {
		case map[string]any:
			next, ok := v[key]
			if !ok {
				return nil, false
			}
			value = next
		case []any:
			i, err := strconv.ParseUint(key, 10, 31)
			if err != nil || int(i) >= len(v) {
				return nil, false
			}
			value = v[i]
		default:
			return nil, false
		}
	}
	return value, true
}

// plain formats a value like EC2's service: a string unchanged, and an object as its
// keys, with a slash after keys of objects.
func plain(value any) (string, bool) {
	switch v := value.(type) {
	case string:
		return v, true
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k, inner := range v {
			if _, ok := inner.(map[string]any); ok {
				k += "/"
			}
			keys = append(keys, k)
		}
		slices.Sort(keys)
		return strings.Join(keys, "\n"), true
	}
	return "", false
}

func fail(w http.ResponseWriter, code int, message string) {
	w.Header().Set("Content-Type", "text/plain")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = io.WriteString(w, message)
}
