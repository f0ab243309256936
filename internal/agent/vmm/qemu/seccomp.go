package qemu

import (
	"fmt"
	"slices"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// The system calls of a QEMU. QEMU's own filter (-sandbox) applies too. docs/security.md
// says how the table was made. A call that is not in the table fails with ENOSYS, as on an
// older kernel, for which every libc has a fallback. So a newer libc works, and a newer
// kernel adds no calls for a guest's QEMU.

// needed are the calls that QEMU makes, and those that another libc or QEMU makes instead.
// None reaches anything outside of the jail.
var needed = []string{
	// Files: the few in the jail, and descriptors from the agent.
	"read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2", "lseek",
	"close", "close_range", "dup", "dup2", "dup3", "fcntl", "flock",
	"open", "openat", "access", "faccessat", "faccessat2", "readlink", "readlinkat",
	"stat", "fstat", "lstat", "newfstatat", "statx", "statfs", "fstatfs", "getdents64", "getcwd", "chdir", "fchdir",
	"fsync", "fdatasync", "sync_file_range", "fallocate", "ftruncate", "fadvise64", "copy_file_range",
	// Memory. TCG writes code, so memory can be executable.
	"brk", "mmap", "munmap", "mremap", "mprotect", "madvise", "msync", "mincore", "membarrier", "get_mempolicy",
	// Threads, signals within the process, and time.
	"futex", "set_robust_list", "get_robust_list", "rseq", "set_tid_address", "arch_prctl", "exit", "exit_group", "restart_syscall",
	"sched_yield", "sched_getaffinity", "sched_getparam", "sched_getscheduler", "sched_get_priority_max", "sched_get_priority_min",
	"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigpending", "rt_sigtimedwait", "rt_sigsuspend", "sigaltstack", "signalfd", "signalfd4", "pause",
	"tkill", // musl's pthread_kill; the PID namespace has only QEMU's threads
	"clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time", "times", "getrusage",
	"timer_create", "timer_settime", "timer_gettime", "timer_getoverrun", "timer_delete", "timerfd_create", "timerfd_settime", "timerfd_gettime", "setitimer", "getitimer",
	// Waiting.
	"eventfd", "eventfd2", "poll", "ppoll", "select", "pselect6", "pipe", "pipe2",
	"epoll_create", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2",
	// The control socket, which the agent passes to QEMU. QEMU cannot make another.
	"listen", "accept", "accept4", "recvmsg", "recvfrom", "sendmsg", "sendto", "shutdown", "getsockname", "getpeername", "getsockopt", "setsockopt",
	// Information about the process and the machine.
	"getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getresuid", "getresgid", "getgroups", "getpgrp", "getpgid", "getsid",
	"capget", "getrlimit", "uname", "sysinfo", "getcpu", "getrandom",
	// QEMU's own filter, which can only forbid more.
	"seccomp",
}

// refused are calls that fail with EPERM. QEMU or its libraries try some and continue
// without; the others fail like for a process without rights.
var refused = []string{
	"socket", "socketpair", "connect", "bind", // libraries look for services of the host
	"kill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "setrlimit",
	"setpriority", "sched_setaffinity", "sched_setparam", "sched_setscheduler", "sched_setattr", "ioprio_set",
	"chmod", "fchmod", "fchmodat", "chown", "fchown", "fchownat", "lchown", "unlink", "unlinkat", "rename", "renameat", "renameat2",
	"link", "linkat", "symlink", "symlinkat", "mkdir", "mkdirat", "rmdir", "mknod", "mknodat", "truncate", "utimensat",
	"inotify_init", "inotify_init1", "setsid", "setpgid",
}

// fatal are calls that only a QEMU makes that its guest has taken over. The kernel kills the
// process before such a call.
var fatal = []string{
	"ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease", "kcmp", "pidfd_open", "pidfd_getfd", "pidfd_send_signal",
	"fork", "vfork", "execveat", "unshare", "setns", "personality",
	"mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr",
	"open_by_handle_at", "fanotify_init", "fanotify_mark", "quotactl", "quotactl_fd", "acct", "swapon", "swapoff",
	"bpf", "perf_event_open", "keyctl", "add_key", "request_key",
	"kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "reboot", "syslog", "vhangup",
	"iopl", "ioperm", "modify_ldt", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname",
	"setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setfsuid", "setfsgid", "setgroups", "capset",
}

// The options of prctl that QEMU and its libraries use for their own threads.
var prctls = []uint64{
	unix.PR_SET_NAME, unix.PR_GET_NAME, unix.PR_SET_TIMERSLACK, unix.PR_MCE_KILL, unix.PR_GET_DUMPABLE,
	unix.PR_SET_NO_NEW_PRIVS, unix.PR_GET_NO_NEW_PRIVS, unix.PR_GET_SECCOMP, unix.PR_CAPBSET_READ, unix.PR_SET_VMA,
}

// fionbio makes a descriptor nonblocking.
const fionbio = 0x5421

// tapRequests are the ioctls for the guest's network card (linux/if_tun.h).
var tapRequests = []uint64{
	unix.TUNGETFEATURES, unix.TUNGETIFF, unix.TUNGETVNETHDRSZ, unix.TUNSETVNETHDRSZ, unix.TUNSETOFFLOAD, unix.TUNSETSNDBUF,
	unix.TUNSETVNETLE, unix.TUNGETVNETLE, unix.TUNSETVNETBE, unix.TUNGETVNETBE, fionbio,
}

// kvmCheckExtension asks KVM whether it has a feature. lastKVMFeature is the last feature
// whose requests kvmRequests has (Linux 6.16). The filter hides later features from QEMU, so
// that QEMU does not use requests that are not in kvmRequests.
const (
	kvmCheckExtension = 0xae03
	lastKVMFeature    = 243
)

// kvmRequests are the ioctls that QEMU 7.2 and 10.0 make on x86 without confidential guests
// and Xen (from accel/kvm, target/i386/kvm and hw/i386/kvm in its sources, with numbers from
// linux/kvm.h). The most frequent ones come first.
var kvmRequests = []uint64{
	0xae80,                 // RUN
	0x4008ae61, 0xc008ae67, // IRQ_LINE, IRQ_LINE_STATUS
	0x4020aea5, // SIGNAL_MSI

	// For KVM.
	0xae00, 0xae01, 0xae04, // GET_API_VERSION, CREATE_VM, GET_VCPU_MMAP_SIZE
	0xc004ae02, 0xc004ae0a, 0xc008ae88, // GET_MSR_INDEX_LIST, GET_MSR_FEATURE_INDEX_LIST, GET_MSRS
	0xc008ae05, 0xc008ae09, 0xc008aec1, // GET_SUPPORTED_CPUID, GET_EMULATED_CPUID, GET_SUPPORTED_HV_CPUID
	0x8008ae9d, // X86_GET_MCE_CAP_SUPPORTED

	// For a machine.
	0xae41, 0xae44, 0xae47, 0x4008ae48, 0xae78, // CREATE_VCPU, SET_NR_MMU_PAGES, SET_TSS_ADDR, SET_IDENTITY_MAP_ADDR, SET_BOOT_CPU_ID
	0x4020ae46, 0x40a0ae49, // SET_USER_MEMORY_REGION, SET_USER_MEMORY_REGION2
	0x4010ae42, 0xc018aec0, 0xaec7, // GET_DIRTY_LOG, CLEAR_DIRTY_LOG, RESET_DIRTY_RINGS
	0xae60, 0xc208ae62, 0x8208ae63, 0x4008ae6a, // CREATE_IRQCHIP, GET_IRQCHIP, SET_IRQCHIP, SET_GSI_ROUTING
	0xae64, 0x4040ae77, 0xc048ae65, 0x8048ae66, 0x8070ae9f, 0x4070aea0, 0xae71, // CREATE_PIT and PIT2, GET and SET of both, REINJECT_CONTROL
	0x4010ae67, 0x4010ae68, 0x4020ae76, 0x4040ae79, // (UN)REGISTER_COALESCED_MMIO, IRQFD, IOEVENTFD
	0x4030ae7b, 0x8030ae7c, 0x4068aea3, // SET_CLOCK, GET_CLOCK, ENABLE_CAP
	0x4020aeb2, 0x4188aec6, // SET_PMU_EVENT_FILTER, X86_SET_MSR_FILTER
	0xc00caee0, 0x4018aee1, 0x4018aee2, 0x4018aee3, // CREATE_DEVICE, SET_, GET_ and HAS_DEVICE_ATTR
	0xaece, // GET_STATS_FD

	// For a processor.
	0x8090ae81, 0x4090ae82, 0x8138ae83, 0x4138ae84, 0x8140aecc, 0x4140aecd, // GET and SET of REGS, SREGS, SREGS2
	0x4008ae89, 0x4010aeab, 0x4010aeac, 0xc008aeb0, // SET_MSRS, GET_ONE_REG, SET_ONE_REG, GET_REG_LIST
	0x81a0ae8c, 0x41a0ae8d, 0x8400ae8e, 0x4400ae8f, // GET and SET of FPU, LAPIC
	0x9000aea4, 0x5000aea5, 0x9000aecf, 0x8188aea6, 0x4188aea7, // GET and SET of XSAVE, GET_XSAVE2, GET and SET of XCRS
	0x4008ae90, 0xc008ae91, // SET_CPUID2, GET_CPUID2
	0xc028ae92, 0x4008ae93, // TPR_ACCESS_REPORTING, SET_VAPIC_ADDR
	0x8004ae98, 0x4004ae99, 0x8040ae9f, 0x4040aea0, 0x8080aea1, 0x4080aea2, // GET and SET of MP_STATE, VCPU_EVENTS, DEBUGREGS
	0x4004ae8b, 0x4004ae86, 0xae9a, 0xaeb7, 0x4048ae9b, // SET_SIGNAL_MASK, INTERRUPT, NMI, SMI, SET_GUEST_DEBUG
	0x4008ae9c, 0x4040ae9e, // X86_SETUP_MCE, X86_SET_MCE
	0xaea2, 0xaea3, 0xaead, // SET_TSC_KHZ, GET_TSC_KHZ, KVMCLOCK_CTRL
	0xc080aebe, 0x4080aebf, // GET_NESTED_STATE, SET_NESTED_STATE
}

// errno returns the action that makes a call fail with e.
func errno(e unix.Errno) seccomp.Action { return seccomp.ActionErrno | seccomp.Action(e) }

// filters returns the seccomp programs for a QEMU with the accelerator. For each call, the
// kernel takes the strictest of their actions.
//
// Each call whose action depends on its arguments has a program of its own, because the
// library's programs confuse the last argument with the call's number afterwards.
func filters(accel string) ([][]unix.SockFilter, error) {
	var all [][]unix.SockFilter
	add := func(policy seccomp.Policy) error {
		program, err := assemble(policy)
		all = append(all, program)
		return err
	}
	err := add(seccomp.Policy{DefaultAction: unknown, Syscalls: []seccomp.SyscallGroup{
		{Action: seccomp.ActionAllow, Names: slices.Concat([]string{"ioctl"}, needed, []string{"prctl", "prlimit64", "tgkill", "clone"})},
		{Action: errno(unix.EPERM), Names: refused},
		// The launcher permits the one that starts QEMU.
		{Action: seccomp.ActionUserNotify, Names: []string{"execve"}},
		{Action: seccomp.ActionKillProcess, Names: fatal},
	}})
	for _, c := range conditional(accel) {
		if err == nil {
			err = add(seccomp.Policy{DefaultAction: seccomp.ActionAllow, Syscalls: []seccomp.SyscallGroup{c}})
		}
	}
	if err != nil {
		return nil, fmt.Errorf("make seccomp filter: %w", err)
	}
	return all, nil
}

// unknown is a placeholder for ENOSYS on calls that no table has, because the library does
// not support a default action with an error number.
const unknown = seccomp.ActionTrace

func assemble(policy seccomp.Policy) ([]unix.SockFilter, error) {
	program, err := policy.Assemble()
	if err != nil {
		return nil, err
	}
	for i, in := range program {
		if in == bpf.Instruction(bpf.RetConstant{Val: uint32(unknown)}) {
			program[i] = bpf.RetConstant{Val: uint32(errno(unix.ENOSYS))}
		}
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		return nil, err
	}
	instructions := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		instructions[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return instructions, nil
}

// conditional returns the rules that forbid calls with certain arguments.
func conditional(accel string) []seccomp.SyscallGroup {
	const self = 1 // QEMU is the first process of its namespace
	call := func(action seccomp.Action, name string, any ...seccomp.ArgumentConditions) seccomp.SyscallGroup {
		g := seccomp.SyscallGroup{Action: action}
		for _, all := range any {
			g.NamesWithCondtions = append(g.NamesWithCondtions, seccomp.NameWithConditions{Name: name, Conditions: all})
		}
		return g
	}
	argument := func(n uint32, is seccomp.Operation, value uint64) seccomp.Condition {
		return seccomp.Condition{Argument: n, Operation: is, Value: value}
	}
	none := func(n uint32, of []uint64) (all seccomp.ArgumentConditions) {
		for _, v := range of {
			all = append(all, argument(n, seccomp.NotEqual, v))
			if v>>31 == 1 { // a negative int, whose sign libc may extend
				all = append(all, argument(n, seccomp.NotEqual, v|0xffffffff<<32))
			}
		}
		return all
	}
	requests := tapRequests
	var later []seccomp.ArgumentConditions
	if accel == KVM {
		requests = slices.Concat(kvmRequests, []uint64{kvmCheckExtension}, tapRequests)
		later = append(later, seccomp.ArgumentConditions{argument(1, seccomp.Equal, kvmCheckExtension), argument(2, seccomp.GreaterThan, lastKVMFeature)})
	}
	return []seccomp.SyscallGroup{
		call(errno(unix.ENOTTY), "ioctl", append(later, none(1, requests))...),
		call(errno(unix.EPERM), "prctl", none(0, prctls)),
		call(errno(unix.EPERM), "prlimit64", seccomp.ArgumentConditions{argument(2, seccomp.NotEqual, 0)}), // sets limits
		call(errno(unix.EPERM), "tgkill", seccomp.ArgumentConditions{argument(0, seccomp.NotEqual, self)}),
		// clone3 has its flags in memory, which a filter cannot read. libc uses clone instead.
		call(seccomp.ActionKillProcess, "clone", seccomp.ArgumentConditions{argument(0, seccomp.BitsNotSet, unix.CLONE_THREAD)}),
	}
}
