package ntp

import (
	"encoding/binary"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

func request(version byte) []byte {
	r := make([]byte, headerSize)
	r[0] = version<<3 | modeClient
	r[2] = 6
	copy(r[40:], "original")
	return r
}

// read is the inverse of stamp, in the present era.
func read(b []byte) time.Time {
	s, f := binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
	return time.Unix(int64(s)-epoch, int64(uint64(f)*1e9>>32))
}

func TestAnswer(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 890_000_000, time.UTC)
	for version := byte(1); version <= 4; version++ {
		a, err := Answer(request(version), now)
		if err != nil {
			t.Fatal(err)
		}
		if a[0] != version<<3|modeServer || a[1] != stratum || a[2] != 6 || int8(a[3]) != precision {
			t.Errorf("version %d: header % x", version, a[:4])
		}
		if string(a[24:32]) != "original" {
			t.Errorf("origin timestamp %q", a[24:32])
		}
		for _, at := range []int{32, 40} {
			if d := read(a[at:]).Sub(now).Abs(); d > time.Microsecond {
				t.Errorf("timestamp at %d is off by %s", at, d)
			}
		}
		if !read(a[16:]).Before(now) {
			t.Error("the clock was set after it was read")
		}
	}
}

func TestOnlyRequestsAreAnswered(t *testing.T) {
	for name, r := range map[string][]byte{
		"empty":     nil,
		"short":     request(4)[:47],
		"version 0": request(0),
		"version 5": request(5),
		"server's":  append([]byte{4<<3 | modeServer}, request(4)[1:]...),
		"control":   append([]byte{4<<3 | 6}, request(4)[1:]...),
		"private":   append([]byte{2<<3 | 7}, request(4)[1:]...),
	} {
		if _, err := Answer(r, time.Now()); !errors.Is(err, ErrNotRequest) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestServe(t *testing.T) {
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- Serve(c) }()
	client, err := net.Dial("udp4", c.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	_ = client.SetDeadline(time.Now().Add(await.Hang))
	// The server ignores anything but requests. It responds to a longer one, with
	// extensions, with no more bytes than it got.
	before := time.Now()
	for _, r := range [][]byte{{}, []byte("junk"), append(request(4), make([]byte, 600)...)} {
		if _, err := client.Write(r); err != nil {
			t.Fatal(err)
		}
	}
	b := make([]byte, 1000)
	n, err := client.Read(b)
	if err != nil || n != headerSize {
		t.Fatalf("%d bytes, %v", n, err)
	}
	// Timestamps have a resolution of 2^-32 s, so rounding loses a little.
	if at := read(b[40:]); at.Before(before.Add(-time.Millisecond)) || at.After(time.Now().Add(time.Millisecond)) {
		t.Errorf("the time is %s, not between %s and now", at, before)
	}
	if read(b[40:]).Before(read(b[32:])) {
		t.Error("sent before it was received")
	}
	c.Close()
	if err := <-done; err != nil {
		t.Errorf("ended with %v", err)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(request(4), int64(0))
	f.Add(request(3)[:20], int64(1)<<40)
	f.Add([]byte{}, int64(-1))
	f.Fuzz(func(t *testing.T, r []byte, unix int64) {
		a, err := Answer(r, time.Unix(unix%(1<<40), 0))
		if err != nil {
			return
		}
		if len(r) < headerSize || r[0]&7 != modeClient || a[0]&7 != modeServer || [8]byte(a[24:32]) != [8]byte(r[40:48]) {
			t.Errorf("% x answered with % x", r, a)
		}
	})
}
