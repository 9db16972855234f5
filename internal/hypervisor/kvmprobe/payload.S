# The payload of the probe: what a kernel does while it boots, in 64-bit mode.
# Loaded at 1 MiB; the first 32 MiB are mapped one to one in 2 MiB pages by the
# host. Page directory at 0x3000, IDT at 0x8000 (filled in here).
# Each stage that was passed is reported by a byte written to port 0xF4.
#   gcc -c -o payload.o payload.S && objcopy -O binary -j .text payload.o payload.bin
	.code64
	.text
	.set PORT, 0xf4
	.set BUF, 0x800000		# 8 MiB of memory to work on

	.macro stage c
	mov	$\c, %al
	out	%al, $PORT
	.endm

	.macro gate n, handler		# interrupt gate n -> handler, selector 8
	lea	\handler(%rip), %rax
	mov	$(0x8000 + 16*\n), %edi
	mov	%ax, (%rdi)
	movw	$8, 2(%rdi)
	movw	$0x8e00, 4(%rdi)
	shr	$16, %rax
	mov	%ax, 6(%rdi)
	shr	$16, %rax
	mov	%eax, 8(%rdi)
	.endm

start:
	stage	'a'			# 64-bit mode runs at all

	mov	$10000000, %ecx		# plain arithmetic
	xor	%ebx, %ebx
1:	lea	7(%rbx,%rcx), %rbx
	dec	%ecx
	jnz	1b
	stage	'b'

	mov	$BUF, %edi		# string store and copy, 8 MiB each
	mov	$0x100000, %ecx
	mov	$0x0123456789abcdef, %rax
	rep stosq
	mov	$BUF, %esi
	mov	$(BUF + 0x800000), %edi
	mov	$0x800000, %ecx
	rep movsb
	stage	'c'

	mov	$BUF, %esi		# what a decompressor does: byte by byte
	mov	$(BUF + 0x800000), %edi
	mov	$0x200000, %ecx
2:	movzbl	(%rsi), %eax
	add	%al, (%rdi)
	inc	%rsi
	inc	%rdi
	dec	%ecx
	jnz	2b
	stage	'd'

	gate	3, on_trap		# exceptions
	gate	6, on_ud
	gate	14, on_pf
	lidt	idt(%rip)
	mov	$500, %r12d
3:	ud2
	int3
	dec	%r12d
	jnz	3b
	stage	'e'

	mov	$500, %r12d		# address space switches
4:	mov	%cr3, %rax
	mov	%rax, %cr3
	incq	BUF
	dec	%r12d
	jnz	4b
	stage	'f'

	movl	$0x600df00d, 0x2000000	# 32 MiB: not mapped; on_pf maps it to BUF
	cmpl	$0x600df00d, BUF
	jne	bad
	stage	'g'

	mov	$0xc0000080, %ecx	# model specific registers, cpuid, tsc
	rdmsr
	wrmsr
	xor	%eax, %eax
	cpuid
	rdtsc
	movq	%rax, %xmm0		# SSE, locked operations
	pxor	%xmm0, %xmm0
	lock incq BUF
	stage	'h'

	mov	$500, %r12d		# exits to the VMM
5:	mov	$'.', %al
	out	%al, $(PORT + 1)
	dec	%r12d
	jnz	5b
	stage	'z'
6:	hlt
	jmp	6b
bad:	stage	'!'
	jmp	6b

on_ud:	addq	$2, (%rsp)		# skip the ud2
	iretq
on_trap: iretq
on_pf:	add	$8, %rsp		# drop the error code
	push	%rax
	movq	$(BUF + 0x83), 0x3000 + 8*16	# present, writable, 2 MiB
	mov	%cr2, %rax
	invlpg	(%rax)
	pop	%rax
	iretq

	.balign	8
idt:	.word	16*32 - 1
	.quad	0x8000
