# SPDX-License-Identifier: MPL-2.0
# getent of a container, see Account in driver.py: assembled by GNU as, its .text is GETENT_CODE and the five numbers.
	cmpq	$3, (%rsp)
	jne	image
	lea	40(%rsp), %rbx
	cmpq	$0, (%rbx)
	je	ours
next:	mov	(%rbx), %rax
	test	%rax, %rax
	jz	image
	add	$8, %rbx
	mov	marker(%rip), %rcx
	cmp	(%rax), %rcx
	jne	next
ours:	mov	16(%rsp), %rax
	mov	passwd(%rip), %rsi
	mov	passwd_length(%rip), %rdx
	cmpb	$'p', (%rax)
	je	answer
	mov	groups(%rip), %rsi
	mov	groups_length(%rip), %rdx
answer:	mov	$1, %edi
	mov	$1, %eax
	syscall
	xor	%edi, %edi
leave:	mov	$60, %eax
	syscall
image:	mov	original(%rip), %rdi
	lea	8(%rsp), %rsi
	mov	(%rsp), %rax
	lea	16(%rsp, %rax, 8), %rdx
	mov	$59, %eax
	syscall
	mov	$2, %edi
	jmp	leave
	.balign	8
marker: .ascii "NSPAWN_G"
passwd: .quad 0
passwd_length: .quad 0
groups: .quad 0
groups_length: .quad 0
original: .quad 0
