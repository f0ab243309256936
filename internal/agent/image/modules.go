package image

import (
	"bufio"
	"bytes"
	"fmt"
	"path"
	"slices"
	"strings"
)

// wanted are the kernel's modules that a guest needs, as far as they are not
// built in: the bus, its devices, and what snapshots and clocks use.
var wanted = []string{
	"virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng",
	"overlay", "vmw_vsock_virtio_transport", "ptp_kvm", "ext4",
}

// moduleName is the name of a module from its file's, in which the kernel
// takes "-" for "_".
func moduleName(file string) string {
	base, _, _ := strings.Cut(path.Base(file), ".")
	return strings.ReplaceAll(base, "-", "_")
}

// loadOrder is the order in which module files must be loaded so that each
// finds what it needs, for the modules named and for all those that they need.
// dep is the text of modules.dep (depmod's man page), builtin that of
// modules.builtin. A name that neither has is an error.
func loadOrder(dep, builtin []byte, names []string) ([]string, error) {
	needs, file := map[string][]string{}, map[string]string{}
	for s := bufio.NewScanner(bytes.NewReader(dep)); s.Scan(); {
		name, rest, ok := strings.Cut(s.Text(), ":")
		if !ok {
			continue
		}
		file[moduleName(name)] = name
		needs[moduleName(name)] = strings.Fields(rest)
	}
	for s := bufio.NewScanner(bytes.NewReader(builtin)); s.Scan(); {
		if n := moduleName(s.Text()); file[n] == "" {
			file[n] = "" // known, and nothing to load
			needs[n] = nil
		}
	}
	var order []string
	done := map[string]bool{}
	var visit func(name string, chain []string) error
	visit = func(name string, chain []string) error {
		if slices.Contains(chain, name) {
			return fmt.Errorf("modules need each other: %s", strings.Join(append(chain, name), " needs "))
		}
		if done[name] {
			return nil
		}
		f, ok := file[name]
		if !ok {
			return fmt.Errorf("the kernel has no module %s", name)
		}
		for _, n := range needs[name] {
			if err := visit(moduleName(n), append(chain, name)); err != nil {
				return err
			}
		}
		done[name] = true
		if f != "" {
			order = append(order, f)
		}
		return nil
	}
	for _, n := range names {
		if err := visit(n, nil); err != nil {
			return nil, err
		}
	}
	return order, nil
}
