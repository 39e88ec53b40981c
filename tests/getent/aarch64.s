// SPDX-License-Identifier: MPL-2.0
// getent of a container, see Account in driver.py: assembled by GNU as, its .text is GETENT_CODE and the five numbers.
	ldr	x9, [sp]
	cmp	x9, #3
	b.ne	image
	add	x10, sp, #40
	ldr	x9, [x10]
	cbz	x9, ours
	ldr	x11, marker
next:	ldr	x9, [x10], #8
	cbz	x9, image
	ldr	x12, [x9]
	cmp	x12, x11
	b.ne	next
ours:	ldr	x9, [sp, #16]
	ldrb	w9, [x9]
	ldr	x1, passwd
	ldr	x2, passwd_length
	cmp	w9, #'p'
	b.eq	answer
	ldr	x1, groups
	ldr	x2, groups_length
answer:	mov	x0, #1
	mov	x8, #64
	svc	#0
	mov	x0, #0
leave:	mov	x8, #93
	svc	#0
image:	ldr	x0, original
	add	x1, sp, #8
	ldr	x2, [sp]
	add	x2, x1, x2, lsl #3
	add	x2, x2, #8
	mov	x8, #221
	svc	#0
	mov	x0, #2
	b	leave
	.balign	8
marker: .ascii "NSPAWN_G"
passwd: .quad 0
passwd_length: .quad 0
groups: .quad 0
groups_length: .quad 0
original: .quad 0
