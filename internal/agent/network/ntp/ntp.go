// Package ntp serves guests the host's time over NTP (RFC 5905).
package ntp

import (
	"encoding/binary"
	"errors"
	"net"
	"time"
)

const (
	headerSize = 48
	modeClient = 3
	modeServer = 4

	// The host's clock follows other servers, so its stratum is at least 2.
	stratum = 2
	// Reading the clock and sending takes about 2^-20 s.
	precision = -20
	// Distance from the reference, in units of 2^-16 s: 1 ms.
	dispersion = 1 << 16 / 1000
	// A local clock, by the convention of RFC 5905's reference implementation.
	reference = 127<<24 | 127<<16 | 1<<8

	// epoch is the beginning of 1970 in seconds since 1900.
	epoch = 2208988800
)

// ErrNotRequest means that a datagram is not a client's request.
var ErrNotRequest = errors.New("not an NTP client request")

// Serve responds to the requests on c until c is closed. No response is larger than its
// request.
func Serve(c net.PacketConn) error {
	var request [512]byte
	for {
		n, from, err := c.ReadFrom(request[:])
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			var netErr net.Error
			if errors.As(err, &netErr) {
				continue // an ICMP error about an earlier response
			}
			return err
		}
		answer, err := Answer(request[:n], time.Now())
		if err != nil {
			continue
		}
		stamp(answer[40:], time.Now())
		_, _ = c.WriteTo(answer[:], from) // if it gets lost, the guest repeats the request
	}
}

// Answer returns the response to a request. received is both its receive and its transmit
// time.
func Answer(request []byte, received time.Time) ([headerSize]byte, error) {
	var a [headerSize]byte
	if len(request) < headerSize {
		return a, ErrNotRequest
	}
	version, mode := request[0]>>3&7, request[0]&7
	if mode != modeClient || version < 1 || version > 4 {
		return a, ErrNotRequest
	}
	a[0] = version<<3 | modeServer // no leap second announced
	a[1] = stratum
	a[2] = request[2] // poll interval, the client's own
	precision := int8(precision)
	a[3] = byte(precision)
	binary.BigEndian.PutUint32(a[8:], dispersion)
	binary.BigEndian.PutUint32(a[12:], reference)
	stamp(a[16:], received.Add(-time.Second)) // the reference time: when the clock was last set
	copy(a[24:32], request[40:48])
	stamp(a[32:], received)
	stamp(a[40:], received)
	return a, nil
}

// stamp writes t as seconds since 1900, in 32 bits without the era, and a 32-bit fraction.
func stamp(b []byte, t time.Time) {
	binary.BigEndian.PutUint32(b, uint32(t.Unix()+epoch))
	binary.BigEndian.PutUint32(b[4:], uint32(uint64(t.Nanosecond())<<32/1e9))
}
